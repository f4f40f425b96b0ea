"""Updates that an accelerator makes itself: the same losses and weights as the CPU's, whatever the share."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_loop import ReferenceLoop
from test_device import accelerated, check_all_back
from test_full import NUMBERS, B, F, batches, check, plain
from test_travel import held_out

import offload
from offload.finetune import assemble as assemble_module
from offload.finetune import assemble_full
from offload.finetune.sharing import parse_share
from offload.kernels import Choice
from offload.kernels.chosen import Kernels
from offload.optim import there
from offload.optim.adamw import AdamW
from offload.planner.training_steps import DownloadShard, Update, UpdateThere, UploadShard

COUNT = 4096  # parameters of a shard: tiny models have several in a unit
TIERS: dict[str, dict[str, Any]] = {
    "a ring on the device": {"share": 0.0, "resident": 1.0},
    "all on the device": {"share": 1.0, "resident": 1.0},
    "half on the device, state on disk": {"share": 0.5, "resident": 0},
    "a ring in memory too": {"share": 0.0, "resident": 0, "resident_weights": 0.0},
    "some of each": {"share": 0.3, "resident": 0.5, "resident_weights": 0.5},
}
CASES = [  # tier, share, clip norm, model
    *((tier, 0.4, clip, "llama-tied") for tier in TIERS for clip in (0.5, None)),
    ("a ring on the device", 1.0, 0.5, "llama-tied"), ("a ring in memory too", 1.0, None, "llama-tied"),
    ("all on the device", 1.0, None, "gpt2"), ("a ring in memory too", 0.4, 0.5, "gpt2"),
    ("some of each", 0.0, 0.5, "llama-tied"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    assemble = assemble_full.assemble
    monkeypatch.setattr(
        assemble_full, "assemble", lambda *parts, **options: assemble(*parts, **options, shard_count=COUNT)
    )


@pytest.mark.parametrize(("tier", "update_share", "clip", "kind"), CASES)
def test_any_share_equals_in_memory(
    tier: str, update_share: float, clip: float | None, kind: str, tmp_path: Path
) -> None:
    dtype, count = (F, 1) if kind == "gpt2" else (B, 2)
    options = TIERS[tier] | {"update_share": update_share, "max_grad_norm": clip, "seed": 5}
    with accelerated(tmp_path, kind, dtype, **options) as trainer:
        loop = ReferenceLoop(plain(tmp_path / "model", dtype), max_grad_norm=clip, seed=5, **NUMBERS)
        check(trainer, loop, count)
        steps = trainer.training.schedule()
        made = {kind: sum(isinstance(s, kind) for s in steps) for kind in (Update, UpdateThere)}
        assert (made[UpdateThere] > 0) == (update_share > 0)
        assert (made[Update] > 0) == (update_share < 1)


@pytest.mark.parametrize("clip", [0.5, None], ids=["clip", "no clip"])
@pytest.mark.parametrize(
    ("tier", "overlap"),
    [("a ring on the device", False), ("all on the device", True), ("some of each", True), ("some of each", False)],
)
def test_between_steps(tier: str, overlap: bool, clip: float | None, tmp_path: Path) -> None:
    """Evaluation, saving, commits and a resume with another share find the present weights and change nothing."""
    options: dict[str, Any] = TIERS[tier] | {"max_grad_norm": clip, "overlap": overlap}
    with accelerated(tmp_path, "llama-tied", B, update_share=0.6, **options) as mine:
        loop = ReferenceLoop(plain(tmp_path / "model", B), max_grad_norm=clip, **NUMBERS)
        first = mine.evaluate(batches(50, 2))
        check(mine, loop, 2, steps=2)
        assert mine.evaluate(batches(50, 2)) != first
        assert mine.evaluate(batches(50, 2)) == held_out(loop)
        check(mine, loop, 1, steps=2)
        mine.save(tmp_path / "out")
        check(mine, loop, 1, steps=1)
        mine.commit()
        mine.step(batches(9, 1))
    with accelerated(tmp_path, "llama-tied", B, resume=True, update_share=0.3, **options) as mine:
        assert mine.evaluate(batches(50, 2)) == held_out(loop)
        check(mine, loop, 2, steps=2)


@pytest.mark.parametrize("clip", [0.5, None], ids=["clip", "no clip"])
@pytest.mark.parametrize("tier", ["a ring on the device", "some of each"])
def test_bytes_are_what_the_tuple_says_and_every_slot_goes_back(tier: str, clip: float | None, tmp_path: Path) -> None:
    with accelerated(tmp_path, "llama", B, max_grad_norm=clip, update_share=0.5, **TIERS[tier]) as mine:
        training = mine.training
        device = training.device
        for step in range(2):
            mine.step(batches(step, 1))
        training._lanes.rest()
        steps = training.schedule()
        assert sum(isinstance(s, UploadShard) for s in steps) == sum(isinstance(s, DownloadShard) for s in steps) > 0
        before = device.statistics()
        mine.step(batches(2, 1))
        training._lanes.rest()
        after = device.statistics()
        cells = {u: cell.nbytes for u, cell in training.cells.layouts.items()}
        down = sum(s.nbytes if getattr(s, "shards", True) else cells[s.unit] for s in steps if is_down(s))
        up = sum(s.nbytes if getattr(s, "shards", True) else cells[s.unit] for s in steps if is_up(s))
        assert after.downloaded_bytes - before.downloaded_bytes == down
        assert after.uploaded_bytes - before.uploaded_bytes >= up  # and what was brought ahead
        pools = [training._walk._there.ring, training._lanes.rings.state, training._updates.slots.ring]
        check_all_back([*pools, *([training._lanes.rings.cells] if training._lanes.rings.cells else [])])
        assert device.statistics().peak_bytes <= device.memory_nbytes


@pytest.mark.parametrize(("update_share", "waiting"), [(1.0, {"upload"}), (0.0, {"update"})])
def test_who_waits_for_the_disk_is_booked(update_share: float, waiting: set[str], tmp_path: Path) -> None:
    options = TIERS["half on the device, state on disk"] | {"update_share": update_share, "max_grad_norm": None}
    with accelerated(tmp_path, "llama-tied", B, **options) as mine:
        for step in range(2):
            mine.step(batches(step, 1))
        totals = mine.training.timeline.totals()
        assert {cause.partition(":")[0] for cause in totals.stall_s if cause.endswith(":read")} == waiting
        assert {"read", "upload", "compute", "download", "write"} <= totals.busy_s.keys()
        assert ("aside" in totals.busy_s) == bool(update_share)


@pytest.mark.parametrize("tier", ["a ring on the device", "all on the device"])
@pytest.mark.parametrize("update_share", [0.0, 0.5])
def test_kernels_for_every_kind_of_shard_are_ready_before_the_first_step(
    tier: str, update_share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready, step = set(), AdamW.step

    def watched(rule: AdamW, state: torch.Tensor, cell: torch.Tensor, *numbers: Any, **options: Any) -> None:
        if threading.current_thread().name != "offload-update":
            kind = (cell.dtype, cell.numel(), cell.data_ptr() % 16)
            assert "mine" not in found or kind in ready
            ready.add(kind)
        step(rule, state, cell, *numbers, **options)

    monkeypatch.setattr(AdamW, "step", watched)
    monkeypatch.setattr(assemble_module, "_warm", lambda optimizer, kernels: None)
    found: dict[str, Any] = {}
    options = TIERS[tier] | {"update_share": update_share, "max_grad_norm": None}
    with accelerated(tmp_path, "llama-tied", B, **options) as mine:
        assert bool(ready) == bool(update_share)
        found["mine"] = mine
        for k in range(2):
            mine.step(batches(k, 1))


def test_a_card_without_the_kernel_makes_no_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own ops would take memory there that is in no sum."""
    rule = AdamW(Kernels("cpu", exact=False))
    given: dict[str, Any] = {"method": "full", "has_device": True, "rule": rule}
    assert parse_share("auto", **given, kind="cuda") is None  # a plan for a card that is elsewhere
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(there, "choose", lambda op, kind: Choice(op, "torch", "no: triton is not installed"))
    assert parse_share("auto", **given, kind="cuda") == 0
    with pytest.raises(offload.UsageError, match=r"does not run \(no: triton is not installed\).*Say 0 or \"auto\"$"):
        parse_share(0.5, **given, kind="cuda")
    assert parse_share(0.5, **given, kind="cpu") == 0.5
    monkeypatch.setattr(there, "choose", lambda op, kind: Choice(op, "gpu", ""))
    assert parse_share("auto", **given, kind="cuda") is None


def is_up(step: Any) -> bool:
    return type(step).__name__.startswith("Upload")


def is_down(step: Any) -> bool:
    return type(step).__name__.startswith("Download")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"device": "cpu", "update_share": 0.5}, "without an accelerator"),
        ({"device": "emulated", "update_share": 1.5}, "expected float <= 1"),
        ({"device": "emulated", "update_share": "half"}, "there are auto, a number"),
        ({"device": "emulated", "update_share": 0.5, "optimizer": "adamw_8bit"}, "has no kernel for accelerators"),
        ({"device": "emulated", "update_share": 0.5, "optimizer": "sgd"}, "has no kernel for accelerators"),
        ({"device": "emulated", "update_share": 0.5, "method": "lora"}, "the CPU makes all updates"),
    ],
)
def test_what_cannot_be_is_said(options: dict[str, Any], why: str, tmp_path: Path) -> None:
    if options["device"] == "emulated":
        options = options | {"gpu_memory": "1GiB"}
    with pytest.raises(offload.UsageError, match=why):
        offload.finetuning(tmp_path, offload_dir=tmp_path / "state", **options)


def test_strict_refuses_updates_that_a_card_cannot_make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload.finetune.finetuning.why_not_on", lambda rule, kind: "Triton is missing")
    given: dict[str, Any] = {"device": "emulated", "gpu_memory": "1GiB", "offload_dir": tmp_path / "state"}
    with pytest.raises(offload.StrictError, match=r"Triton is missing; strict mode forbids .* Say 0"):
        offload.finetuning(tmp_path, strict=True, **given)
