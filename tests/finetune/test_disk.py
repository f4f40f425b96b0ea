"""The disk: what a run will take is summed before it starts, and what it took is given back when it is finished."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from models import MODELS

import offload
from offload.checkpoint.outline import outline
from offload.finetune.choice import SLOTS
from offload.finetune.disk import Finished, check_room, finish_state, forget_finished, read_finished
from offload.finetune.forecast import forecast
from offload.finetune.memory import Wishes, plan_first
from offload.finetune.outlook import Outlook, foresee
from offload.finetune.pricing import Batch
from offload.finetune.reading import make_config
from offload.io.safetensors import read_checkpoint
from offload.kernels.chosen import Kernels
from offload.optim import make
from offload.profile import preset
from offload.tiers.cells import lay_out_cell, page
from offload.units import GIB, MIB


def plan_of(folder: Path, kind: str = "llama", steps: int = 10, **sections: Any) -> Outlook:
    if not (folder / kind).exists():
        MODELS[kind].save(folder / kind)
    config = make_config({"model": str(folder / kind), "data": {"train": "x.jsonl"}, **sections})
    return foresee(config, outline(folder / kind, read_checkpoint(folder / kind)).spec, steps)


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit", "sgd", "adafactor", "apollo"])
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "gpt2"])
def test_the_plan_is_what_the_state_takes(optim: str, kind: str, tmp_path: Path) -> None:
    plan = plan_of(tmp_path, kind, train={"optim": optim})
    with offload.finetuning(tmp_path / kind, optimizer=optim, offload_dir=tmp_path / "state") as trainer:
        taken = trainer.training.state_nbytes
        shards = sum(len(cell.shards) for cell in trainer.training.cells.layouts.values())
    assert taken - (4096 + 256 * 12) * shards <= plan.state_nbytes <= taken, "but for what fills pages"


def test_adapters_have_little_state(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, method="lora", lora={"r": 4})
    with offload.finetuning(tmp_path / "llama", method="lora", lora={"r": 4}, offload_dir=tmp_path / "a") as trainer:
        assert plan.params == sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    some = plan_of(tmp_path, method="lora", lora={"r": 4, "target_modules": ["q_proj"]})
    assert some.params == 5 * 4 * (64 + 64)
    assert plan_of(tmp_path, method="zo").disk_nbytes == 0


def test_activations_and_copies_are_in_the_plan(tmp_path: Path) -> None:
    plain = plan_of(tmp_path)
    assert (plain.activation_nbytes, plain.exports, plain.exports_written) == (0, 1, 1)
    sections = {"data": {"train": "x.jsonl", "max_length": 100}, "budgets": {"activations": "disk"}}
    plan = plan_of(
        tmp_path, **sections,
        train={"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8, "export_steps": 2,
               "save_total_limit": 3},
    )  # fmt: skip
    assert plan.activation_nbytes == 6 * 16 * 100 * 64 * 4
    assert plan.disk_nbytes == plain.disk_nbytes + plan.activation_nbytes
    assert plan.write_bytes_per_step == plain.state_nbytes + plan.activation_nbytes
    assert (plan.exports, plan.exports_written) == (5, 5)  # three copies, one being written, and the model at the end
    wear = plan_of(tmp_path, budgets={"drive_tbw": "1TB"})
    assert wear.drive_steps == 10**12 // plain.state_nbytes


def test_activations_take_no_more_than_planned(tmp_path: Path) -> None:
    from test_full import batches

    plan = plan_of(
        tmp_path, data={"train": "x.jsonl", "max_length": 24}, budgets={"activations": "disk"},
        train={"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    )  # fmt: skip
    with offload.finetuning(tmp_path / "llama", activations="disk", offload_dir=tmp_path / "state") as trainer:
        trainer.step(batches(0, 2))
        stash = trainer.training.backprop.inputs.stash
        assert stash is not None
        assert 0 < stash.peak_nbytes <= plan.activation_nbytes


def test_what_does_not_fit_is_refused_with_its_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Outlook(params=GIB, weight_nbytes=2 * GIB, state_nbytes=12 * GIB, steps=5, export_nbytes=2 * GIB)
    state, out = tmp_path / "out" / "state", tmp_path / "out"
    with pytest.raises(
        offload.BudgetError, match=r"disk_limit=10.0 GiB.* 24.0 GiB \(optimizer state, twice\).*adamw_8bit"
    ):
        check_room(plan, state, out, 10 * GIB, resume=False)
    free = SimpleNamespace(f_bavail=25 * 2**20, f_frsize=1024)
    monkeypatch.setattr(os, "statvfs", lambda path: free)
    with pytest.raises(offload.StorageError, match=r"26.0 GiB of it .* 25.0 GiB are free"):
        check_room(plan, state, out, None, resume=False)
    check_room(plan, state, out, None, resume=True)  # its model has its place already
    free.f_bavail = 26 * 2**20
    check_room(plan, state, out, 24 * GIB, resume=False)


def test_a_limit_holds_without_a_configuration_too(tmp_path: Path) -> None:
    MODELS["llama"].save(tmp_path / "model")
    with pytest.raises(offload.BudgetError, match=r"disk_limit=.* is too small: optimizer state, in two slots"):
        offload.finetuning(tmp_path / "model", offload_dir=tmp_path / "state", disk_limit=100_000)


def test_only_the_state_is_removed(tmp_path: Path) -> None:
    for name in ("state.json", "state.bin", "state.lock", "weights-12-0.bin", "weights-mine.bin", "notes.txt"):
        (tmp_path / name).write_text("x")
    assert read_finished(tmp_path) is None
    finish_state(tmp_path, Finished(step=7, model="out"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["finished.json", "notes.txt", "weights-mine.bin"]
    assert read_finished(tmp_path) == Finished(step=7, model="out")
    forget_finished(tmp_path)
    assert read_finished(tmp_path) is None


def test_the_room_for_weights_that_travel_is_in_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is planned from headers is at least what the first step takes, and nothing where nothing travels."""
    monkeypatch.setattr("offload.finetune.memory.rss_bytes", lambda: 100 * MIB)
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6, "vocab_size": 4000}
    transformers.LlamaConfig(**sizes, num_attention_heads=8, dtype="float32").save_pretrained(tmp_path)
    sketch = outline(tmp_path, None)  # 90 MB
    rule = make("adamw", Kernels("cpu", exact=False))
    cells = [
        lay_out_cell(unit.name, {n: (torch.float32, sketch.sources[n].shape) for n in unit.tensors})
        for unit in sketch.anatomy.units
    ]
    shards = [page(rule.state_nbytes(shard.shape)) for cell in cells for shard in cell.shards]
    travelled = []
    for mib in range(200, 700, 20):
        budget = mib * MIB
        try:
            first = plan_first(cells, min(SLOTS, len(shards)) * max(shards), budget, Wishes())
            found = forecast(
                sketch.spec, rule, preset("cpu-ddr5-nvme4"), batch=Batch(rows=1, tokens=8), clips=True, budget=budget,
                base=100 * MIB,
            )  # fmt: skip
        except offload.BudgetError:
            continue
        taken = sum(page(cell.nbytes) for cell in cells if cell.unit not in first.kept)
        assert taken <= found.room_nbytes, budget
        assert found.scratch_nbytes <= found.room_nbytes or not first.travels_nbytes
        travelled.append(bool(taken))
    assert set(travelled) == {True, False}, travelled
