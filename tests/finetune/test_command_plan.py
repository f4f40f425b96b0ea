"""What a fine-tuning run will take is said before it starts, and holds."""

from __future__ import annotations

import json
from bisect import bisect_left
from dataclasses import replace
from pathlib import Path

import pytest
import transformers
from command_line import finetune, plan

from offload.checkpoint.outline import outline
from offload.commands import outlook
from offload.errors import BudgetError
from offload.finetune.assemble_zeroth import place_zeroth
from offload.io.safetensors import read_checkpoint
from offload.profile import preset
from offload.runtime.discovery import dissect
from offload.specs import Budgets
from offload.tiers.logfile import LogFile

BASE = 100 << 20  # bytes of a process, as plan and run are told


def test_a_small_disk_is_met_before_the_start(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune(config, "budgets.disk_limit=1MiB") == 1
    said = capsys.readouterr().err
    assert "disk_limit=1.0" in said
    assert "optimizer state, twice" in said
    assert not (tmp_path / "out").exists()


def test_plan_of_a_configuration(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The object that a run reports, without a run."""
    memory = ("--hardware", "cpu-ddr5-nvme4", "--cpu-memory", "4GiB")
    assert plan(config, *memory, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert finetune(config, "--dry-run", "--json", "budgets.cpu_memory=4GiB") == 0
    facts = json.loads(capsys.readouterr().out)
    assert all(facts[k] == found[k] for k in ("model", "total_steps", "data"))
    assert found["plan"].keys() == facts["plan"].keys()
    kinds = found["plan"]["bytes"]
    assert kinds["optimizer"]["disk"] == 2 * found["plan"]["state_bytes"]
    assert kinds["optimizer"]["host"] == found["plan"]["predicted"]["state_in_memory_bytes"]
    assert sum(row.get("host", 0) for row in kinds.values()) <= 4 << 30
    assert plan(config, "train.max_steps=3", "train.optim=sgd", *memory, "--json") == 0
    other = json.loads(capsys.readouterr().out)
    assert (other["total_steps"], other["plan"]["state_bytes"]) == (3, found["plan"]["state_bytes"] * 8 // 12)
    assert plan(config, *memory) == 0
    text = capsys.readouterr().out
    assert "parameters to train" in text
    assert "optimizer" in text
    assert not (tmp_path / "out").exists()


def test_a_step_that_will_not_fit_is_foretold(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(config, "--hardware", "cpu-ddr5-nvme4", "--cpu-memory", "100MiB") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "note: a full step is foretold not to fit, so the run may end at its first one" in said
    assert "predicted:" not in said


def test_a_prediction_without_a_probe_is_an_estimate_and_says_why(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune(config, "--dry-run", "budgets.cpu_memory=4GiB") == 0
    said = capsys.readouterr().err
    assert "predicted (estimate): a step" in said
    (note,) = (line for line in said.splitlines() if line.startswith("note: the prediction is an estimate, from "))
    assert "a second's look" in note
    assert "; offload probe /" in note
    assert plan(config, "--cpu-memory", "4GiB") == 0
    assert note in capsys.readouterr().out.splitlines()
    assert plan(config, "--cpu-memory", "4GiB", "--hardware", "cpu-ddr5-nvme4") == 0
    assert "the rates of cpu-ddr5-nvme4 were not measured here" in capsys.readouterr().out


def test_a_prediction_from_another_models_products_is_an_estimate(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = replace(preset("cpu-ddr5-nvme4"), source="measured")
    monkeypatch.setattr(outlook, "machine", lambda *_: measured)
    monkeypatch.setattr(outlook.small_step, "with_small_step", lambda profile, *_, **__: profile)
    assert finetune(config, "--dry-run", "budgets.cpu_memory=4GiB") == 0
    said = capsys.readouterr().err
    assert "predicted (estimate): a step" in said
    assert outlook.SCALED in said


def test_options_of_a_model_are_refused_for_a_configuration(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(config, "--batch", "4") == 2
    assert "--batch goes with a model" in capsys.readouterr().err
    assert plan(config, "train.optin=sgd") == 2
    assert "did you mean train.optim?" in capsys.readouterr().err


def test_dry_run(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune(config, "--dry-run", "data.shuffle=false") == 0
    assert capsys.readouterr().out == "<s>User: Which is number 0?\nAssistant: ⟦It is 0.</s>⟧\n\n"
    assert finetune(config, "--dry-run", "--json", "data.shuffle=false") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["excerpt"] == "<s>User: Which is number 0?\nAssistant: ⟦It is 0.</s>⟧\n"
    assert report["total_steps"] == 12
    params = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_pretrained(report["model"]).parameters())
    predicted, kinds = report["plan"].pop("predicted"), report["plan"].pop("bytes")
    assert kinds["optimizer"]["disk"] == 24 * params
    assert predicted["step_s"] >= predicted["bound_s"] > 0
    assert (predicted["read_bytes"], predicted["write_bytes"], predicted["scratch_bytes"]) == (0, 0, 0)  # it all fits
    assert predicted["state_in_memory_bytes"] >= 12 * params
    assert report["plan"] == {
        "params": params,
        "weight_bytes": 4 * params,
        "state_bytes": 12 * params,
        "activation_bytes": 0,
        "disk_bytes": 24 * params,
        "output_bytes": 4 * params,
        "write_bytes_per_step_at_most": 12 * params,
        "write_bytes_at_most": (1 + 12) * 12 * params + 4 * params,
        "drive_steps_at_least": 600 * 10**12 // (12 * params),
        "written_back_bytes_at_most": 0,
        "notes": report["plan"]["notes"],
    }
    assert predicted["origin"] == "estimate"
    assert finetune(config, "--explain") == 0
    assert "Backward" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["lora", "zo"])
def test_it_says_where_weights_that_no_gradient_trains_live(
    method: str, config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = [f"method={method}", "train.max_steps=1", {"lora": "lora.r=4", "zo": "zo.write_every=2"}[method]]
    assert finetune(config, *options) == 0
    shown = " ".join(capfd.readouterr().err.split())
    assert "stay in memory" in shown
    assert ("both sides" in shown) == (method == "zo")
    assert finetune(config, *options, f"train.output_dir={tmp_path / 'again'}", "--json") == 0
    plan = json.loads(capfd.readouterr().out.splitlines()[-1])["plan"]
    assert plan["streamed_nbytes"] == plan["step_nbytes"] == 0
    assert plan["predicted"]["step_s"] > 0
    assert plan["resident_nbytes"] == plan["weight_bytes"]


def small_budget(model: Path, tokens: int) -> int:
    """Bytes with which a part of the weights streams: the least that works, to an eighth of a MiB."""
    sketch = outline(model, read_checkpoint(model))
    anatomy = dissect(sketch.model, shares=False)

    def is_enough(budget: int) -> bool:
        try:
            place_zeroth(sketch.model, anatomy, sketch.sources, Budgets(cpu_memory=budget), tokens, BASE)
        except BudgetError:
            return False
        return True

    budgets = range(BASE, 4 * BASE, 1 << 17)
    return budgets[bisect_left(budgets, True, key=is_enough)]


def test_the_plan_has_what_zo_writes_back(
    config: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offload.finetune.room.rss_bytes", lambda: BASE)
    monkeypatch.setattr("offload.commands.outlook.process_nbytes", lambda exact: BASE)
    options = [
        "method=zo", "zo.write_every=2", "train.max_steps=6", "train.save_steps=1",
        f"budgets.cpu_memory={small_budget(model, 2 * 64)}", "--json",
    ]  # fmt: skip
    most: list[int] = []
    count = LogFile.sweep
    monkeypatch.setattr(LogFile, "sweep", lambda log, used: (most.append(log.taken_nbytes()), count(log, used))[1])
    assert finetune(config, *options) == 0
    report = json.loads(capsys.readouterr().out)
    plan, streamed = report["plan"], report["plan"]["streamed_nbytes"]
    assert plan["predicted"]["read_bytes"] == plan["step_nbytes"]
    assert plan["predicted"]["write_bytes"] == streamed // 2, "every second step writes back"
    assert 0 < streamed < plan["weight_bytes"]
    assert plan["written_back_bytes_at_most"] == 2 * streamed
    pages = 4096 * 64
    assert streamed <= max(most) <= plan["disk_bytes"] + pages
    assert 2 * streamed <= report["write_bytes"] <= plan["written_back_bytes_at_most"] + pages
    limited = [f"train.output_dir={tmp_path / 'limited'}", f"budgets.disk_limit={streamed // 2}"]
    most.clear()
    assert finetune(config, *options, *limited) == 0
    report = json.loads(capsys.readouterr().out)
    assert (max(most), report["write_bytes"]) == (0, 0)
    assert report["plan"]["disk_bytes"] <= streamed // 2
