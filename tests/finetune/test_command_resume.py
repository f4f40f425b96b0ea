"""A fine-tuning run that crashed, was stopped or is finished goes on where it was, and never over another one."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from command_line import TALK, facts, finetune, same, weights

from offload.errors import BudgetError
from offload.finetune import finish
from offload.finetune.aside import aside
from offload.finetune.journal import read_journal
from offload.finetune.trainer import Trainer


@pytest.mark.parametrize(("died_at", "packing"), [(1, True), (4, False), (7, True)])  # commits are at 3, 6 and 9
def test_resume_after_a_crash_is_exact(
    config: Path, tmp_path: Path, packing: bool, died_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [f"data.packing={packing}", "train.max_steps=9"]
    assert finetune(config, *options, f"train.output_dir={tmp_path / 'whole'}") == 0
    step = Trainer.step

    def dying(self: Any, *arguments: Any, **more: Any) -> Any:
        if self.step_number == died_at:
            raise SystemExit(9)
        return step(self, *arguments, **more)

    monkeypatch.setattr(Trainer, "step", dying)
    assert finetune(config, *options) == 9
    monkeypatch.setattr(Trainer, "step", step)
    assert finetune(config, *options, "--resume") == 0
    assert facts(tmp_path / "out") == facts(tmp_path / "whole")
    assert same(weights(tmp_path / "out"), weights(tmp_path / "whole"))


@pytest.mark.parametrize("name", ["log.jsonl", "tokenizer.json", "tokenizer_config.json"])
def test_a_disk_that_is_full_for_a_small_file_costs_no_step(
    config: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever writes it: we, transformers or tokenizers."""

    @contextmanager
    def no_room(folder: Path) -> Iterator[Path]:
        with aside(folder) as part:
            (part / name).symlink_to("/dev/full")
            yield part

    options = ["train.max_steps=4"]
    assert finetune(config, *options, f"train.output_dir={tmp_path / 'whole'}") == 0
    out = tmp_path / "out"
    out.mkdir()
    capsys.readouterr()
    with monkeypatch.context() as full:
        if name == "log.jsonl":
            (out / name).symlink_to("/dev/full")
        else:
            full.setattr(finish, "aside", no_room)
        assert finetune(config, *options) == 1
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert str(out) in said
    assert "resume" in said
    assert [path.name for path in out.iterdir() if path.name not in ("log.jsonl", "state")] == []
    if (out / name).is_symlink():
        (out / name).unlink()
    assert finetune(config, *options, "--resume") == 0
    assert facts(out) == facts(tmp_path / "whole")
    assert same(weights(out), weights(tmp_path / "whole"))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_and_commits(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, status: int,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert finetune(config, f"train.output_dir={tmp_path / 'whole'}") == 0
    step = Trainer.step

    def interrupted(self: Any, *arguments: Any, **more: Any) -> Any:
        if self.step_number == 4:
            os.kill(os.getpid(), number)
        return step(self, *arguments, **more)

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(Trainer, "step", interrupted)
    assert finetune(config) == status
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert "committed at step 5 of 12; --resume goes on" in capsys.readouterr().err
    assert len(facts(tmp_path / "out")) == 5
    assert not (tmp_path / "out" / "config.json").exists()
    monkeypatch.setattr(Trainer, "step", step)
    assert finetune(config, "--resume") == 0
    assert facts(tmp_path / "out") == facts(tmp_path / "whole")


def test_resume_of_a_complete_run_with_its_state_changes_nothing(config: Path, tmp_path: Path) -> None:
    assert finetune(config, "budgets.keep_state=true") == 0
    before = facts(tmp_path / "out"), weights(tmp_path / "out")
    assert finetune(config, "budgets.keep_state=true", "--resume") == 0
    assert facts(tmp_path / "out") == before[0]
    assert same(weights(tmp_path / "out"), before[1])


def test_resume_with_other_data_is_refused(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune(config, "train.max_steps=3", "budgets.keep_state=true") == 0
    assert finetune(config, "train.max_steps=6", "--resume", "train.seed=1", "data.max_length=32") == 2
    said = capsys.readouterr().err
    assert "data.max_length was 64 and is 32" in said
    assert "train.seed was 42 and is 1" in said
    (tmp_path / "chat.jsonl").write_text(json.dumps(TALK[0]))
    assert finetune(config, "train.max_steps=6", "--resume") == 2
    assert "digest of data.train was" in capsys.readouterr().err


def test_a_folder_that_holds_a_run_is_not_overwritten(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune(config, "train.max_steps=1") == 0
    assert finetune(config, "train.max_steps=1") == 2
    assert "holds a run already (log.jsonl); go on with --resume" in capsys.readouterr().err


def test_a_loss_that_is_no_number(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = Trainer.step

    def broken(self: Any, micro_batches: Sequence[Any], learning_rate: float | None = None) -> Any:
        return step(self, micro_batches, 1e38 if self.step_number == 3 else learning_rate)

    monkeypatch.setattr(Trainer, "step", broken)
    assert finetune(config) == 1
    said = capsys.readouterr().err
    assert "step 5" in said
    assert "nan" in said
    monkeypatch.setattr(Trainer, "step", step)
    assert finetune(config, "--resume") == 0


def test_a_finished_run_leaves_no_state(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its resume says that it is finished; a longer one says what to do."""
    assert finetune(config, "train.max_steps=3") == 0
    state = tmp_path / "out" / "state"
    assert [p.name for p in state.iterdir()] == ["finished.json"]
    before = facts(tmp_path / "out"), weights(tmp_path / "out")
    capsys.readouterr()
    assert finetune(config, "train.max_steps=3", "--resume") == 0
    assert "the run is finished: 3 steps" in capsys.readouterr().err
    assert facts(tmp_path / "out") == before[0]
    assert same(weights(tmp_path / "out"), before[1])
    assert finetune(config, "train.max_steps=5", "--resume") == 2
    assert "keep_state=true" in capsys.readouterr().err
    kept = [f"train.output_dir={tmp_path / 'kept'}", "budgets.keep_state=true"]
    assert finetune(config, "train.max_steps=3", *kept) == 0
    assert not (tmp_path / "kept" / "state" / "finished.json").exists()
    assert finetune(config, "train.max_steps=5", *kept, "--resume") == 0
    assert read_journal(tmp_path / "kept" / "log.jsonl")[-1]["step"] == 5


def test_a_step_without_room_leaves_what_was_done(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune(config, f"train.output_dir={tmp_path / 'whole'}") == 0
    step = Trainer.step

    def refusing(self: Any, *arguments: Any, **more: Any) -> Any:
        if self.step_number == 5:  # commits are at 3, 6 and 9
            raise BudgetError("its rows are too long")
        return step(self, *arguments, **more)

    monkeypatch.setattr(Trainer, "step", refusing)
    assert finetune(config) == 1
    monkeypatch.setattr(Trainer, "step", step)
    capsys.readouterr()
    assert finetune(config, "--resume") == 0
    assert "going on after step 5" in capsys.readouterr().err
    assert facts(tmp_path / "out") == facts(tmp_path / "whole")
