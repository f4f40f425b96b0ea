"""Models whose products are not those of nn.Linear: they are measured in their own layout, and their blocks, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import MODELS, Tiny

import offload
from offload.errors import ModelError
from offload.probes import blocks
from offload.probes.sampling import Meter
from offload.probes.subject import Subject
from offload.profile import Profile


def probed(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Profile:
    monkeypatch.setenv("OFFLOAD_CACHE", str(tmp_path / "cache"))
    folder = tiny.save(tmp_path / "model", torch.bfloat16)
    return offload.probe(folder, effort="tiny", offload_dir=tmp_path)


def shapes(profile: Profile, op: str, implementation: str) -> set[tuple[int, ...]]:
    return {t.shape for t in profile.ops if (t.op, t.implementation) == (op, implementation)}


def test_conv1d(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = probed(MODELS["gpt2"], tmp_path, monkeypatch)
    assert shapes(found, "linear_transposed", "torch") == {(192, 64), (64, 64), (256, 64), (64, 256)}
    assert shapes(found, "linear", "cpu") == {(320, 64)}
    assert shapes(found, "block", "cpu") == {(64,)}
    assert not any("blocks were not measured" in note for note in found.notes)


def test_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = probed(MODELS["mixtral"], tmp_path, monkeypatch)
    for implementation in ("cpu", "torch"):
        assert shapes(found, "linear_groups", implementation) == {(192, 64), (64, 96)}
    assert {(64, 64), (32, 64), (320, 64)} <= shapes(found, "linear", "cpu")
    assert (192, 64) not in shapes(found, "linear", "cpu")
    assert shapes(found, "block", "cpu") == {(64,)}


def test_a_context_bounds_what_is_measured() -> None:
    subject = Subject(name="learned positions", max_tokens=128)
    assert subject.fitting((16, 64, 256, 1024)) == (16, 64, 128)
    assert subject.fitting((16, 512), beside=100) == (16, 28)
    assert Subject(name="any").fitting((16, 1 << 20)) == (16, 1 << 20)


def test_what_a_models_own_code_raises_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise IndexError("layer 3 of 2")

    monkeypatch.setattr(blocks, "small_model", fails)
    made: Any = blocks.Blocks(Subject(name="x"), (2, 8), 0.0, Meter(1, 0.0), None)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="a model of 2 layers fails: IndexError: layer 3 of 2"):
        made.figures((1,), (16,), (16,))
