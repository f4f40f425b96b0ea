"""Weights and gradients that do not stay in memory change nothing, whatever else happens between steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import MODELS
from reference_loop import ReferenceLoop
from test_full import NUMBERS, B, F, batches, check, plain, rate

import offload
from offload.finetune.trainer import Trainer
from offload.io.engine import IOStatistics
from offload.planner.training import moved
from offload.planner.training_steps import Update
from offload.runtime.training_lanes import LOOSE

CASES = [  # model, dtype, micro-batches, clip norm
    ("llama", B, 1, 0.5), ("llama", B, 2, None), ("llama", F, 1, None), ("llama-tied", B, 3, 0.5),
    ("llama-tied", B, 1, None), ("gpt2", B, 2, 0.5), ("gpt2", F, 1, None), ("qwen3_moe", B, 3, None),
    ("mixtral", F, 1, 0.5),
]  # fmt: skip


def travelling(folder: Path, kind: str = "llama", dtype: torch.dtype = B, **options: Any) -> Any:
    if not (folder / "model").exists():
        MODELS[kind].save(folder / "model", dtype)
    given = {"resident": 0, "resident_weights": 0.0, "dtype": dtype, "offload_dir": folder / "state", **NUMBERS}
    return offload.finetuning(folder / "model", **(given | options))


@pytest.mark.parametrize(("kind", "dtype", "micro_batches", "clip"), CASES)
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_travelling_equals_in_memory(
    share: float, kind: str, dtype: torch.dtype, micro_batches: int, clip: float | None, tmp_path: Path
) -> None:
    with travelling(tmp_path, kind, dtype, max_grad_norm=clip, resident_weights=share, seed=5) as trainer:
        loop = ReferenceLoop(plain(tmp_path / "model", dtype), max_grad_norm=clip, seed=5, **NUMBERS)
        check(trainer, loop, micro_batches)


@pytest.mark.parametrize(("kind", "dtype", "micro_batches", "clip"), [c for c in CASES if c[-1]])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_state_that_is_written_in_the_backward_pass(
    share: float, kind: str, dtype: torch.dtype, micro_batches: int, clip: float, tmp_path: Path
) -> None:
    """Evaluations, commits and changes of what stays come between; some state and some cells stay."""
    options = {"max_grad_norm": clip, "resident": 0.3, "resident_weights": 0.4}
    with travelling(tmp_path, kind, dtype, **options) as trainer:
        trainer.training.defer(share)
        loop = ReferenceLoop(plain(tmp_path / "model", dtype), max_grad_norm=clip, **NUMBERS)
        check(trainer, loop, micro_batches, steps=3)
        updates = [s for s in trainer.training.schedule() if isinstance(s, Update)]
        assert {s.made for s in updates} >= {"update", "trial"}
        assert share < 1 or (
            "rounding" in {s.made for s in updates} and {s.goes_aside for s in updates} == {True, False}
        )
        assert trainer.evaluate(batches(50, 2)) == held_out(loop)
        check(trainer, loop, micro_batches, steps=2)
        trainer.commit()
        trainer.training.keep_cells([], (3, max(c.nbytes for c in trainer.training.cells.layouts.values())))
        check(trainer, loop, 1, steps=2)
        trainer.commit()
        trainer.step(batches(9, 1))
    with travelling(tmp_path, kind, dtype, resume=True, **options) as trainer:
        trainer.training.defer(share)
        assert trainer.evaluate(batches(50, 2)) == held_out(loop)
        check(trainer, loop, 2, steps=2)


@pytest.mark.parametrize("clip", [0.5, None], ids=["clip", "no clip"])
@pytest.mark.parametrize("name", ["adamw_8bit", "sgd"])
def test_with_every_optimizer(name: str, clip: float | None, tmp_path: Path) -> None:
    found = []
    for place, options in (("disk", {}), ("memory", {"resident": 1.0, "resident_weights": 1.0})):
        given = {"optimizer": name, "max_grad_norm": clip, "betas": None, "eps": None, "offload_dir": tmp_path / place}
        with travelling(tmp_path, "qwen3", **given, **options) as trainer:
            numbers = [trainer.step(batches(step, 2), rate(step)) for step in range(3)]
            weights = {n: w.detach().clone() for n, w in trainer.weights().items()}
        found.append(([(r.loss, r.grad_norm) for r in numbers], weights))
    (one, left), (other, right) = found
    assert one == other
    assert all(torch.equal(w, right[n]) for n, w in left.items())


@pytest.mark.parametrize("clip", [0.5, None], ids=["clip", "no clip"])
def test_between_steps(clip: float | None, tmp_path: Path) -> None:
    """Evaluation, saving, commits and a resume find the present weights and change nothing."""
    options = {"max_grad_norm": clip, "resident": 0.4}
    with travelling(tmp_path, **options) as mine:
        loop = ReferenceLoop(plain(tmp_path / "model", B), max_grad_norm=clip, **NUMBERS)
        first = mine.evaluate(batches(50, 2))
        check(mine, loop, 2, steps=1)
        assert mine.evaluate(batches(50, 2)) != first
        assert mine.evaluate(batches(50, 2)) == held_out(loop)
        check(mine, loop, 1, steps=2)
        mine.save(tmp_path / "out")
        mine.commit()
        mine.step(batches(9, 1))
    loaded = dict(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").named_parameters())
    assert all(torch.equal(loaded[n], p) for n, p in loop.model.named_parameters())
    with travelling(tmp_path, resume=True, **options) as mine:
        assert mine.evaluate(batches(50, 2)) == held_out(loop)
        check(mine, loop, 2, steps=2)


def held_out(loop: ReferenceLoop) -> tuple[float, int]:
    """What `evaluate` gives of the batches of step 50."""
    loop.model.eval()
    with torch.no_grad():
        pairs = [
            (float(loop.model(**b, use_cache=False).loss), int((b["labels"][:, 1:] != -100).sum()))
            for b in batches(50, 2)
        ]
    loop.model.train()
    return sum(x * n for x, n in pairs), sum(n for _, n in pairs)


@pytest.mark.parametrize("clip", [0.5, None], ids=["clip", "no clip"])
@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_what_stays_may_change(kind: str, clip: float | None, tmp_path: Path) -> None:
    """Between steps cells come to stay, and others go; one may be empty, as a head that is the embedding."""
    with travelling(tmp_path, kind, max_grad_norm=clip) as mine:
        loop = ReferenceLoop(plain(tmp_path / "model", B), max_grad_norm=clip, **NUMBERS)
        training = mine.training
        units = [u for u, cell in training.cells.layouts.items() if cell.places and u != LOOSE]
        largest = max(cell.nbytes for cell in training.cells.layouts.values())
        for kept in (units[::2], units[1::2], units, []):
            check(mine, loop, 1, steps=1)
            memory = training._lanes.rings.cells.buffer._memory
            training.keep_cells(kept, (3, largest))
            assert [u for u in units if training.cells.stays(u)] == kept
            assert memory.closed, "somebody holds the memory of the ring before"
            check(mine, loop, 2, steps=1)


@pytest.mark.parametrize("clip", [0.5, None], ids=["clip", "no clip"])
def test_what_moves_is_what_the_tuple_says(clip: float | None, tmp_path: Path) -> None:
    with travelling(tmp_path, max_grad_norm=clip) as mine:
        for step in range(2):
            mine.step(batches(step, 1))
        schedule, before = mine.training.schedule(), settled(mine)
        mine.step(batches(2, 1))
        after = settled(mine)
        read, written = moved(schedule)
        assert after.write_bytes - before.write_bytes == written
        assert after.read_bytes - before.read_bytes >= read  # and what was read ahead
        count = sum(p.numel() for p in mine.model.parameters())
        assert written <= 14.5 * count + 4096 * len(schedule)
        assert read <= 18.5 * count + 4096 * len(schedule)


def settled(trainer: Trainer) -> IOStatistics:
    """Bytes moved, with nothing under way."""
    training = trainer.training
    training._lanes.rest()
    training.state.drain()
    training._spill.drain()
    return trainer._engine.statistics()


class Backwards(torch.nn.Module):
    """Blocks that run in another order than they stand."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in reversed(self.blocks):
            x = block(x)
        return x.square().mean()


@pytest.mark.parametrize("clip", [0.5, None], ids=["clip", "no clip"])
def test_the_order_is_learnt(clip: float | None, tmp_path: Path) -> None:
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        folder = tmp_path / f"{len(found)}"
        with offload.finetuning(Backwards(), offload_dir=folder, max_grad_norm=clip, resident=0) as mine:
            if found:
                largest = max(cell.nbytes for cell in mine.training.cells.layouts.values())
                mine.training.keep_cells([], (3, largest))
            found.append([mine.step({"x": torch.ones(2, 8)}, 1e-3).loss for _ in range(4)])
    assert found[0] == found[1]
    assert found[0][-1] < found[0][0]
