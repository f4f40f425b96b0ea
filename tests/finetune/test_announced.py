"""What is announced is what is chosen, and `offload.finetuning` chooses for itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_line import finetune

import offload
from offload.commands import outlook
from offload.finetune import assemble_full
from offload.finetune.choice import Choice, announced, told
from offload.finetune.forecast import Forecast

TOLD = Choice(slots=11, defers=0.5)  # that nobody would choose for a model that fits


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Options of trainers that were put together."""
    found, assemble = list[dict[str, Any]](), assemble_full.assemble
    monkeypatch.setattr(
        assemble_full, "assemble", lambda *parts, **options: (found.append(options), assemble(*parts, **options))[1]
    )
    return found


@pytest.mark.parametrize("choice", [None, TOLD], ids=["its own", "another"])
def test_what_is_announced_is_chosen(
    choice: Choice | None,
    config: Path,
    opened: list[dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forecast = outlook.forecast

    def foretold(*parts: Any, **options: Any) -> Forecast:
        found = forecast(*parts, **options)
        return found if choice is None else replace(found, choice=choice)

    def again(*_: Any, **__: Any) -> Any:
        raise AssertionError("one look serves both")

    monkeypatch.setattr(outlook, "forecast", foretold)
    monkeypatch.setattr(assemble_full, "forecast", again)
    monkeypatch.setattr(assemble_full, "glance", again)
    assert finetune(config, "train.max_steps=2", "budgets.device=cpu", "--json") == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])["plan"]["predicted"]
    names = {"state_slots": "slots", "state_in_backward": "defers", "update_share": "update_share"}
    (options,) = opened
    assert options["choice"] == Choice(**{of: said[name] for name, of in names.items()})
    assert choice in (None, options["choice"])
    assert told() is None, "the next trainer chooses for itself"


def test_a_trainer_chooses_for_itself(model: Path, tmp_path: Path, opened: list[dict[str, Any]]) -> None:
    for name in ("told", "not told"):
        with announced(TOLD if name == "told" else None):
            offload.finetuning(model, offload_dir=tmp_path / name, device="cpu").close()
    assert [options["choice"] for options in opened] == [TOLD, Choice()]
