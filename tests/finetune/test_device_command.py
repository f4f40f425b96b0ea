"""`offload finetune` with an accelerator: the same model comes out, and the plan shows what crosses the link."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from command_line import finetune, same, weights
from tiny_text import save

from offload.finetune.journal import read_journal

DEVICE = ("budgets.device=emulated", "budgets.gpu_memory=4MiB", "budgets.link=2GB/s")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("one two three four five six seven eight nine ten. " * 40)
    values = {
        "model": str(save(tmp_path / "model")),
        "data": {"train": str(tmp_path / "text.txt"), "max_length": 32},
        "train": {"output_dir": str(tmp_path / "out"), "max_steps": 4, "save_steps": 2, "report_to": "none"},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_the_same_model_comes_out(config: Path, tmp_path: Path) -> None:
    found = []
    for name, words in (("cpu", ["budgets.device=cpu"]), ("device", DEVICE)):
        out = tmp_path / name
        assert finetune(config, f"train.output_dir={out}", *words) == 0
        lines = [line for line in read_journal(out / "log.jsonl") if "loss" in line]
        found.append((weights(out), [(line["loss"], line["grad_norm"]) for line in lines]))
        assert all(line["predicted_step_s"] > 0 for line in lines)
    (one, losses), (other, others) = found
    assert losses == others
    assert len(losses) == 4
    assert same(one, other)
    assert all(torch.isfinite(tensor).all() for tensor in one.values())


@pytest.mark.parametrize("method", ["lora", "zo"])
def test_other_methods_too(method: str, config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = []
    for name, words in (("cpu", ["budgets.device=cpu"]), ("device", DEVICE)):
        assert finetune(config, f"method={method}", f"train.output_dir={tmp_path / name}", *words) == 0
        lines = [line for line in read_journal(tmp_path / name / "log.jsonl") if "loss" in line]
        found.append([(line["loss"], line["grad_norm"]) for line in lines])
        assert all(line["predicted_step_s"] > 0 for line in lines)
    assert found[0] == found[1]
    assert len(found[0]) == 4
    assert ("on the accelerator" in " ".join(capfd.readouterr().err.split())) == (method == "lora")


def test_the_plan_shows_what_crosses(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune(config, "--explain", *DEVICE) == 0
    shown = capsys.readouterr().out
    assert "Upload" in shown
    assert "Download" in shown
    assert "beside" in shown
    assert finetune(config, "--explain", "budgets.device=cpu") == 0
    assert "Upload" not in capsys.readouterr().out
    for method, word in (("lora", "Update"), ("zo", "Move")):
        assert finetune(config, f"method={method}", "--explain", *DEVICE) == 0
        shown = capsys.readouterr().out
        assert word in shown
        assert "Upload" in shown


def test_a_device_that_is_too_small(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune(config, "budgets.device=emulated", "budgets.gpu_memory=64KiB") == 1
    assert "gpu_memory=64.0 KiB is too small for this training" in capsys.readouterr().err
