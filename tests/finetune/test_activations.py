"""Inputs of units that wait on disk: they come back as they were, change no number, and leave no file."""

from __future__ import annotations

import errno
import os
import random
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MODELS
from reference_loop import ReferenceLoop
from test_full import NUMBERS, B, F, batches, check, plain

import offload
from offload.finetune.activations import StepFacts, UnitFacts, seconds, units_to_swap
from offload.io.engine import Engine
from offload.tiers import stash as stash_module
from offload.tiers.stash import Stash, can_put


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that tiny tensors take several blocks, and more than the ring has."""
    monkeypatch.setattr(stash_module, "BLOCK", 4096)
    monkeypatch.setattr(stash_module, "GROWTH", 65536)


@pytest.mark.parametrize("order", ["as announced", "unannounced", "shuffled"])
def test_tensors_come_back_as_they_were(order: str, tmp_path: Path) -> None:
    rng = random.Random(1)
    with Engine() as engine:
        stash = Stash(tmp_path, engine)
        for _ in range(3):
            tensors = [torch.randn(rng.randrange(1, 9), rng.randrange(1, 3000)).to(B if k % 2 else F) for k in range(9)]
            tickets = [stash.put(tensor) for tensor in tensors]
            wanted = [t.clone() for t in tensors]
            for tensor in tensors:
                tensor.zero_()  # its memory is free
            pairs = list(zip(tickets, wanted, strict=True))[::-1]
            if order != "unannounced":
                stash.expect([ticket for ticket, _ in pairs])
            if order == "shuffled":
                rng.shuffle(pairs)
            for ticket, tensor in pairs:
                found = stash.take(ticket)
                assert found.dtype == tensor.dtype
                assert torch.equal(found, tensor)
            stash.clear()
            assert not list(tmp_path.iterdir()), "the file has no name"
        assert stash._ring is not None
        stash._ring.check_integrity()
        assert stash._ring.statistics().leased == 0
        stash.close()


def test_only_tensors_of_their_own_go() -> None:
    whole = torch.randn(4, 64)
    assert can_put(whole)
    assert not can_put(whole[1:]), "a part of another one"
    assert not can_put(whole.t()), "strides"
    assert not can_put(torch.empty(0))


def test_a_pass_that_failed_leaves_nothing_leased(tmp_path: Path) -> None:
    with Engine() as engine:
        stash = Stash(tmp_path, engine)
        tickets = [stash.put(torch.randn(3000)) for _ in range(6)]
        stash.expect(tickets)
        stash.take(tickets[0])
        stash.clear()
        assert stash._ring is not None
        assert stash._ring.statistics().leased == 0
        again = stash.put(torch.ones(100))
        assert torch.equal(stash.take(again), torch.ones(100))
        stash.close()


def test_limits_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine() as engine:
        stash = Stash(tmp_path, engine, limit=100_000)
        stash.put(torch.ones(4096))
        with pytest.raises(offload.BudgetError, match="disk_limit"):
            stash.put(torch.ones(100_000))
        stash.close()

        def full(*args: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        stash = Stash(tmp_path, engine)
        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(offload.StorageError, match="no room for"):
            stash.put(torch.ones(4096))
        stash.close()


CASES = [("llama", B, 1, 0.5), ("llama-tied", F, 3, None), ("gpt2", B, 3, 0.5), ("qwen3_moe", B, 3, None)]


@pytest.mark.parametrize(("kind", "dtype", "micro_batches", "clip"), CASES)
def test_activations_on_disk_change_nothing(
    kind: str, dtype: torch.dtype, micro_batches: int, clip: float | None, tmp_path: Path
) -> None:
    MODELS[kind].save(tmp_path / "model", dtype)
    loop = ReferenceLoop(plain(tmp_path / "model", dtype), max_grad_norm=clip, **NUMBERS)
    with offload.finetuning(
        tmp_path / "model", max_grad_norm=clip, offload_dir=tmp_path / "state", dtype=dtype, activations="disk",
        resident=0, **NUMBERS
    ) as trainer:  # fmt: skip
        check(trainer, loop, micro_batches)
        stash = trainer.training.backprop.inputs.stash
        assert stash is not None
        width = 64 * dtype.itemsize * 2 * 24  # hidden state of a micro-batch
        assert stash.peak_nbytes >= 5 * width * micro_batches, "the inputs of five blocks"
        assert sorted(p.name for p in (tmp_path / "state").iterdir()) == ["state.bin", "state.json"]


def test_short_memory_swaps_in_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """auto: what does not fit goes to disk, at once, and the numbers stay."""
    monkeypatch.setattr("offload.finetune.activations.NEAR", 0.0)
    monkeypatch.setattr("offload.finetune.trainer.rehearse", lambda *_: None)  # nobody knows what the step will take
    MODELS["llama"].save(tmp_path / "model", B)
    loop = ReferenceLoop(plain(tmp_path / "model", B), max_grad_norm=0.5, **NUMBERS)
    with offload.finetuning(
        tmp_path / "model", max_grad_norm=0.5, offload_dir=tmp_path / "state", **NUMBERS
    ) as trainer:  # fmt: skip
        check(trainer, loop, 2, steps=1)
        stash = trainer.training.backprop.inputs.stash
        assert stash is not None
        assert stash.peak_nbytes > 0
        assert not trainer.training.backprop.inputs.is_pressed()


class Broken:
    """An engine whose disk fails."""

    def write(self, *args: Any) -> Future[int]:
        future: Future[int] = Future()
        future.set_exception(offload.StorageError("a write failed: Input/output error", path="swap", errno=errno.EIO))
        return future


def test_a_failed_write_ends_the_step_with_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    MODELS["llama"].save(tmp_path / "model", B)
    with offload.finetuning(
        tmp_path / "model", offload_dir=tmp_path / "state", activations="disk", resident=1.0
    ) as trainer:  # fmt: skip
        trainer.step(batches(0, 2))
        trainer.commit()
        stash = trainer.training.backprop.inputs.stash
        assert stash is not None
        monkeypatch.setattr(stash, "_engine", Broken())
        with pytest.raises(offload.StorageError, match="write failed"):
            trainer.step(batches(1, 2))


UNITS = [UnitFacts(swap_nbytes=10, graph_nbytes=100, forward_s=1.0) for _ in range(12)]


def step_of(**numbers: Any) -> StepFacts:
    return StepFacts(**({"free_nbytes": 0, "compute_s": 36.0, "disk_s": 5.0, "rate": 100.0} | numbers))


def test_nothing_is_swapped_where_the_disk_is_slowest() -> None:
    assert units_to_swap(UNITS, step_of(disk_s=50.0)) == 0
    assert units_to_swap(UNITS, step_of(rate=0.0)) == 0


def test_nothing_is_swapped_where_everything_fits() -> None:
    assert units_to_swap(UNITS, step_of(free_nbytes=5000)) == 0


def test_what_does_not_fit_is_swapped() -> None:
    assert units_to_swap(UNITS, step_of(free_nbytes=-35, disk_s=50.0)) == 4
    assert units_to_swap(UNITS, step_of(free_nbytes=-35, rate=0.0)) == 4
    assert units_to_swap(UNITS, step_of(free_nbytes=-10_000)) == len(UNITS) - 1, "as many as there are"


def test_swapping_pays_until_the_disk_is_slower() -> None:
    """The curve falls while graphs are won, rises when the disk is the slower one; the choice is its lowest."""
    for rate in (0.5, 1.0, 5.0, 50.0):
        for free in (0, 60, 250):
            step = step_of(free_nbytes=free, rate=rate)
            curve = [seconds(UNITS, step, k) for k in range(len(UNITS))]
            assert curve[units_to_swap(UNITS, step)] == min(curve)
    assert units_to_swap(UNITS, step_of(free_nbytes=60)) == 4, "60 + 4 x 10 bytes are one graph"
