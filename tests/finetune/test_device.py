"""Training on an accelerator equals the in-memory loop: the emulated one computes on the CPU, so bit for bit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import MODELS
from patience import HANGS_S
from reference_loop import ReferenceLoop
from test_full import NUMBERS, B, F, batches, check, plain
from test_travel import Backwards, held_out

import offload
from offload.finetune.accelerator import Accelerator
from offload.finetune.trainer import Trainer
from offload.io.buffers import Buffer, BufferPool
from offload.planner.schedule import Download, Upload
from offload.planner.training_steps import Update
from offload.tiers.cells import lay_out_cell
from offload.tiers.emulated import EmulatedDevice

CASES = [  # model, dtype, micro-batches, clip norm
    ("llama", B, 1, 0.5), ("llama", B, 2, None), ("llama", F, 1, None), ("llama-tied", B, 3, 0.5),
    ("llama-tied", B, 1, None), ("gpt2", B, 2, 0.5), ("gpt2", F, 1, None), ("qwen3_moe", B, 3, None),
    ("mixtral", F, 1, 0.5),
]  # fmt: skip
TIERS: dict[str, dict[str, Any]] = {
    "a ring on the device": {"share": 0.0},
    "half on the device": {"share": 0.5},
    "all on the device": {"share": 1.0},
    "a ring in memory too": {"share": 0.0, "resident": 0, "resident_weights": 0.0},
    "some of each": {"share": 0.3, "resident": 0.5, "resident_weights": 0.5},
}


def accelerated(folder: Path, kind: str, dtype: torch.dtype, *, share: float, **options: Any) -> Any:
    """A trainer on the emulated device, if no other is named: its memory holds the ring and a share of the weights."""
    if not (folder / "model").exists():
        MODELS[kind].save(folder / "model", dtype)
    given = {"device": "emulated", "dtype": dtype, "offload_dir": folder / "state", "tokens": 48, **NUMBERS, **options}
    if "gpu_memory" not in given:
        weights = sum(f.stat().st_size for f in (folder / "model").glob("*.safetensors"))
        with pytest.raises(offload.BudgetError) as error:
            offload.finetuning(folder / "model", gpu_memory="100KiB", **given)
        given["gpu_memory"] = least(str(error.value)) + int(share * weights)
    return offload.finetuning(folder / "model", **given)


def least(text: str) -> int:
    """What an error says would do, a little more than it prints."""
    number, unit = text.partition("Give at least ")[2].split(",")[0].split()
    return int(float(number) * {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}[unit] * 1.01) + 4096


HALVES = ({0, 2, 3, 5, 7}, {1, 4, 6, 7, 8})  # of CASES, each with all dtypes, micro-batches, clip norms and experts


def cells() -> Iterator[Any]:
    """Every case on every tier; tiers take turns with the half of the cases that is not slow."""
    for number, tier in enumerate(TIERS):
        for k, case in enumerate(CASES):
            is_slow = k not in HALVES[number % 2]
            yield pytest.param(tier, *case, marks=[pytest.mark.slow] * is_slow)


@pytest.mark.parametrize(("tier", "kind", "dtype", "micro_batches", "clip"), list(cells()))
def test_on_a_device_equals_in_memory(
    tier: str, kind: str, dtype: torch.dtype, micro_batches: int, clip: float | None, tmp_path: Path
) -> None:
    with accelerated(tmp_path, kind, dtype, max_grad_norm=clip, seed=5, **TIERS[tier]) as trainer:
        loop = ReferenceLoop(plain(tmp_path / "model", dtype), max_grad_norm=clip, seed=5, **NUMBERS)
        check(trainer, loop, micro_batches)


def deferring() -> Iterator[Any]:
    """Every tier and share with the cases that clip; half of them are slow, so that any two values still meet."""
    clipping = [c for c in CASES if c[-1]]
    for i, tier in enumerate(TIERS):
        for j, share in enumerate((0.5, 1.0)):
            for k, case in enumerate(clipping):
                yield pytest.param(tier, share, *case, marks=[pytest.mark.slow] * ((i + j + k) % 2))


@pytest.mark.parametrize(("tier", "share", "kind", "dtype", "micro_batches", "clip"), list(deferring()))
def test_state_that_is_written_in_the_backward_pass(
    tier: str, share: float, kind: str, dtype: torch.dtype, micro_batches: int, clip: float, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"resident": 0.3, **TIERS[tier], "max_grad_norm": clip}
    with accelerated(tmp_path, kind, dtype, **options) as trainer:
        trainer.training.defer(share)
        loop = ReferenceLoop(plain(tmp_path / "model", dtype), max_grad_norm=clip, **NUMBERS)
        check(trainer, loop, micro_batches, steps=3)
        assert any(s.made == "trial" for s in trainer.training.schedule() if isinstance(s, Update))
        assert trainer.evaluate(batches(50, 2)) == held_out(loop)
        check(trainer, loop, 1, steps=2)
        trainer.commit()
        trainer.step(batches(9, 1))
    with accelerated(tmp_path, kind, dtype, resume=True, **options) as trainer:
        trainer.training.defer(share)
        assert trainer.evaluate(batches(50, 2)) == held_out(loop)
        check(trainer, loop, 2, steps=2)


@pytest.mark.parametrize("share", [0.0, 0.6])
@pytest.mark.parametrize("clip", [0.5, None], ids=["clip", "no clip"])
def test_one_thing_at_a_time_changes_nothing(clip: float | None, share: float, tmp_path: Path) -> None:
    options: dict[str, Any] = TIERS["a ring in memory too"] | {"max_grad_norm": clip, "overlap": False}
    with accelerated(tmp_path, "llama-tied", B, **options) as trainer:
        trainer.training.defer(share)
        loop = ReferenceLoop(plain(tmp_path / "model", B), max_grad_norm=clip, **NUMBERS)
        check(trainer, loop, 2)


@pytest.mark.parametrize("tier", ["half on the device", "some of each"])
def test_what_crosses_the_link_is_pinned_while_it_lives(
    tier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned: dict[int, Buffer] = {}

    def register(_: EmulatedDevice, buffer: Buffer) -> str | None:
        pinned[buffer.address] = buffer
        return "this memory could not be pinned"

    def unregister(_: EmulatedDevice, buffer: Buffer) -> None:
        assert buffer.view.nbytes, "the memory is gone already"
        del pinned[buffer.address]

    monkeypatch.setattr(EmulatedDevice, "register", register)
    monkeypatch.setattr(EmulatedDevice, "unregister", unregister)
    with accelerated(tmp_path, "llama", B, max_grad_norm=0.5, **TIERS[tier]) as trainer:
        for k in range(2):
            trainer.step(batches(k, 1))
        cells = trainer.training.cells
        rings = (trainer.training.cell_ring_nbytes > 0) + (trainer.training._lanes.rings.aside is not None)
        assert len(pinned) == sum(map(cells.stays, cells.layouts)) + rings
        assert "this memory could not be pinned" in trainer.fallbacks
    assert not pinned


@pytest.mark.parametrize("clip", [0.5, None], ids=["clip", "no clip"])
@pytest.mark.parametrize("tier", ["half on the device", "a ring in memory too"])
def test_between_steps(tier: str, clip: float | None, tmp_path: Path) -> None:
    """Evaluation, saving, commits and a resume find the present weights and change nothing."""
    options: dict[str, Any] = TIERS[tier] | {"max_grad_norm": clip}
    with accelerated(tmp_path, "llama-tied", B, **options) as mine:
        loop = ReferenceLoop(plain(tmp_path / "model", B), max_grad_norm=clip, **NUMBERS)
        first = mine.evaluate(batches(50, 2))
        check(mine, loop, 2, steps=1)
        assert mine.evaluate(batches(50, 2)) != first
        assert mine.evaluate(batches(50, 2)) == held_out(loop)
        check(mine, loop, 1, steps=2)
        mine.save(tmp_path / "out")
        mine.flush()
        shown = {n: p for n, p in mine.model.named_parameters() if mine.training.cells.stays(unit_of(mine, n))}
        assert all(torch.equal(p, dict(loop.model.named_parameters())[n]) for n, p in shown.items())
        mine.commit()
        mine.step(batches(9, 1))
    loaded = dict(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").named_parameters())
    assert all(torch.equal(loaded[n], p) for n, p in loop.model.named_parameters())
    with accelerated(tmp_path, "llama-tied", B, resume=True, **options) as mine:
        assert mine.evaluate(batches(50, 2)) == held_out(loop)
        check(mine, loop, 2, steps=2)


def check_all_back(pools: Sequence[BufferPool]) -> None:
    """Every slot of these rings goes back: at once, or when the write that it is lent to has ended."""
    for pool in pools:
        for lease in [pool.lease(timeout=HANGS_S) for _ in range(pool.statistics().slots)]:
            lease.release()
        pool.check_integrity()
        assert pool.statistics().leased == 0


def unit_of(trainer: Trainer, name: str) -> str:
    return next(u for u, cell in trainer.training.cells.layouts.items() if name in cell.places)


@pytest.mark.parametrize("clip", [0.5, None], ids=["clip", "no clip"])
def test_bytes_are_what_the_tuple_says_and_every_slot_goes_back(clip: float | None, tmp_path: Path) -> None:
    with accelerated(tmp_path, "llama", B, max_grad_norm=clip, **TIERS["some of each"]) as mine:
        training = mine.training
        device, there = training.device, training._there
        for step in range(2):
            mine.step(batches(step, 1))
        training._lanes.rest()
        before = device.statistics()
        mine.step(batches(2, 1))
        training._lanes.rest()
        after = device.statistics()
        steps = training.schedule()
        cells = {u: cell.nbytes for u, cell in training.cells.layouts.items()}
        down = sum(cells[s.unit] for s in steps if isinstance(s, Download))
        assert after.downloaded_bytes - before.downloaded_bytes == down == sum(cells.values())
        up = sum(cells[s.unit] for s in steps if isinstance(s, Upload))
        once = sum(n for u, n in cells.items() if there.stays(u)) + cells[training._tuples.order[-1]] * (
            not there.stays(training._tuples.order[-1])
        )
        assert up == 2 * sum(cells.values()) - once
        assert after.uploaded_bytes - before.uploaded_bytes >= up  # and what was brought ahead
        check_all_back([there.ring, training._lanes.rings.state, training._lanes.rings.cells])
        assert device.statistics().peak_bytes <= device.memory_nbytes
        updates = [s for s in steps if isinstance(s, Update)]
        assert updates
        assert all(s.is_beside for s in updates)


@pytest.mark.parametrize("clip", [0.5, None], ids=["clip", "no clip"])
def test_the_order_is_learnt(clip: float | None, tmp_path: Path) -> None:
    found = []
    for options in ({"device": "cpu"}, {"device": "emulated", "gpu_memory": "300KiB"}):
        torch.manual_seed(0)
        folder = tmp_path / f"{len(found)}"
        with offload.finetuning(Backwards(), offload_dir=folder, max_grad_norm=clip, **options) as mine:
            found.append([mine.step({"x": torch.ones(2, 8)}, 1e-3).loss for _ in range(4)])
    assert found[0] == found[1]
    assert found[0][-1] < found[0][0]


def test_a_module_gets_its_last_weights(tmp_path: Path) -> None:
    found = []
    for options in ({"device": "cpu"}, {"device": "emulated", "gpu_memory": "300KiB"}):
        torch.manual_seed(0)
        module = Backwards()
        with offload.finetuning(module, offload_dir=tmp_path / f"{len(found)}", **options) as mine:
            for _ in range(3):
                mine.step({"x": torch.ones(2, 8)}, 1e-3)
        found.append({n: p.detach().clone() for n, p in module.named_parameters()})
    assert all(torch.equal(p, found[1][n]) for n, p in found[0].items())


@pytest.mark.parametrize("clip", [0.5, None], ids=["clip", "no clip"])
def test_damage_is_named(clip: float | None, tmp_path: Path) -> None:
    """What a lane finds out reaches the loop, and nothing hangs."""
    with accelerated(tmp_path, "llama", B, max_grad_norm=clip, **TIERS["a ring in memory too"]) as mine:
        mine.step(batches(0, 1))
        training = mine.training
        training._lanes.rest()
        training.state.drain()
        name = next(iter(training.state._shards))
        training.state._shards[name].checksum = "0"
        with pytest.raises(offload.CheckpointError, match="is damaged"):
            mine.step(batches(1, 1))
        with pytest.raises(offload.ModelError, match="Go on from the last commit"):
            mine.step(batches(1, 1))


@pytest.mark.parametrize("activations", ["keep", "recompute", "auto"])
def test_graphs_are_kept_where_weights_stay(activations: str, tmp_path: Path) -> None:
    with accelerated(tmp_path, "llama", B, share=0.5, activations=activations) as mine:
        loop = ReferenceLoop(plain(tmp_path / "model", B), max_grad_norm=1.0, **NUMBERS)
        check(mine, loop, 2)
        there = mine.training._there
        kept = [part.name for part in mine.training.backprop.parts.values() if part.keeps]
        assert kept
        assert all(there.stays(unit) or unit == mine.training._tuples.order[-1] for unit in kept)


@pytest.mark.parametrize("activations", ["recompute", "auto"])
def test_inputs_that_the_device_has_no_room_for_wait_in_memory(activations: str, tmp_path: Path) -> None:
    with accelerated(tmp_path, "llama-tied", B, share=0.3, activations=activations) as mine:
        loop = ReferenceLoop(plain(tmp_path / "model", B), max_grad_norm=1.0, **NUMBERS)
        backprop = mine.training.backprop
        check(mine, loop, 1)
        assert backprop.inputs.stash.peak_nbytes == 0
        backprop.inputs.is_pressed = lambda: backprop.inputs.held_nbytes >= 3000
        check(mine, loop, 3)
        assert backprop.inputs.stash.peak_nbytes > 0
        assert backprop.inputs.stash._held == 0
        before = mine.training.device.statistics().downloaded_bytes
        mine.evaluate(batches(50, 1))
        assert mine.training.device.statistics().downloaded_bytes == before


def test_inputs_go_on_to_disk(tmp_path: Path) -> None:
    with accelerated(tmp_path, "llama-tied", B, share=0.3, activations="disk") as mine:
        loop = ReferenceLoop(plain(tmp_path / "model", B), max_grad_norm=1.0, **NUMBERS)
        for micro_batches in (1, 3):
            check(mine, loop, micro_batches)
        ashore = mine.training.backprop.inputs.stash
        assert ashore._stash.peak_nbytes > 0
        assert (ashore._held, len(ashore._passing)) == (0, 0)


def test_a_parameter_of_several_parts_is_counted_once() -> None:
    cell, asked = 64 * 64 * 2, Accelerator(name="emulated", memory=1 << 20, activations={"inputs of units": 1000})
    device, there = asked.open([lay_out_cell(u, {f"{u}.weight": (B, (64, 64))}) for u in ("a", "b", "(loose)")])
    with contextlib.closing(device):
        gradients = 3 * cell + 3 * cell  # of the larger part, and of what several use
        assert there.spare_nbytes == asked.memory - 3 * cell - gradients - 1000


def test_what_is_refused(tmp_path: Path) -> None:
    MODELS["llama"].save(tmp_path / "model", B)
    with pytest.raises(offload.UsageError, match="needs gpu_memory"):
        offload.finetuning(tmp_path / "model", device="emulated", offload_dir=tmp_path / "state")
    with pytest.raises(offload.UsageError, match="CUDA device"):
        offload.finetuning(tmp_path / "model", device="cuda:7", gpu_memory="1GiB", offload_dir=tmp_path / "state")
    with pytest.raises(offload.UsageError, match="no GPU was found"):
        offload.finetuning(tmp_path / "model", device="cpu", gpu_memory="1GiB", offload_dir=tmp_path / "state")
    with pytest.raises(offload.UsageError, match="link="):
        offload.finetuning(tmp_path / "model", device="cpu", link="1GB/s", offload_dir=tmp_path / "state")
    given = {"device": "emulated", "gpu_memory": "1MiB", "offload_dir": tmp_path / "state"}
    with pytest.raises(offload.UsageError, match=r"activations='keep'.* there are auto, recompute, disk$"):
        offload.finetuning(tmp_path / "model", method="lora", activations="keep", **given)
    with pytest.raises(offload.UsageError, match="device='gpu' is not known; there are cpu, emulated, cuda"):
        offload.finetuning(tmp_path / "model", device="gpu", offload_dir=tmp_path / "state")
