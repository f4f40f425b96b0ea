"""The executor with a fake mover: order, slots, errors, and models that do not follow the schedule."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from models import MODELS

import offload
from offload.io.buffers import BufferPool, Lease
from offload.planner.placement import Placement, Ring, Tier
from offload.planner.schedule import Compute, Read, Schedule, emit
from offload.planner.virtual import replay
from offload.runtime.executor import Executor
from offload.runtime.timeline import Timeline
from offload.specs import TensorSpec
from offload.tiers.device import Event
from offload.tiers.devices import CpuDevice


class FakeMover:
    """Reads are done at once, later, or never; it remembers which were asked for."""

    def __init__(self, slots: int, *, later: bool = False) -> None:
        self.device = CpuDevice()
        self.host_ring, self.device_ring = BufferPool(slots, 0), BufferPool(1, 0)
        self.reads: list[str] = []
        self.fails: set[str] = set()
        self._later = later

    def read(self, unit: str, lease: Lease) -> Future[int]:
        self.reads.append(unit)
        future: Future[int] = Future()
        if unit in self.fails:
            future.set_exception(offload.StorageError("the disk is gone", path=unit, offset=0))
        elif self._later:
            threading.Thread(target=future.set_result, args=(1,)).start()
        else:
            future.set_result(1)
        return future

    def upload(self, unit: str, host_slot: int | None, device_slot: int, after: Event | None) -> Event:
        raise AssertionError("nothing is uploaded here")


pytestmark = pytest.mark.usefixtures("two_threads")
UNITS = tuple("abcdef")
STREAMED = ("a", "c", "d", "f")


def schedule_of(order: Sequence[str]) -> Schedule:
    bundles = {u: (TensorSpec(name=u, nbytes=8, read_nbytes=8, slot_nbytes=8),) for u in STREAMED}
    home = {u: Tier.DISK if u in STREAMED else Tier.HOST for u in UNITS}
    ring = Ring(2, 8)
    placement = Placement(home=home, tables=frozenset(), host_ring=ring, device_ring=Ring(0, 0), bundles=bundles)
    return emit([(u, 8) for u in order], placement)


@contextmanager
def executor(mover: FakeMover) -> Iterator[Executor]:
    runner = Executor(UNITS, schedule_of, mover, Timeline())
    try:
        yield runner
    finally:
        runner.close()
        mover.host_ring.check_integrity()
        assert mover.host_ring.statistics().leased == 0
        assert not [t for t in threading.enumerate() if t.name.startswith("offload-read")]


def visit(runner: Executor, *units: str) -> None:
    for unit in units:
        lease = runner.enter(unit)
        assert (lease is not None) == (unit in STREAMED)
        runner.leave()


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_reads_follow_the_schedule_and_never_outrun_the_ring(slots: int, later: bool) -> None:
    mover = FakeMover(slots, later=later)
    with executor(mover) as runner:
        for number in range(20):
            visit(runner, *UNITS)
            assert len(mover.reads) <= len(STREAMED) * (number + 1) + slots
        assert runner.statistics().restarts == 0
        assert runner.statistics().passes == 20
    assert mover.reads[: len(STREAMED) * 20] == list(STREAMED) * 20


def test_the_order_is_that_of_the_virtual_clock() -> None:
    mover = FakeMover(2)
    with executor(mover) as runner:
        visit(runner, *UNITS, *UNITS)
        spans = [s for s in runner._timeline.spans if s.lane == "compute"]
    events = replay(schedule_of(UNITS), lambda s: 1.0, slots={"host": 2}, passes=2)
    assert [s.name for s in spans] == [e.step.unit for e in events if isinstance(e.step, Compute)]
    assert mover.reads[:8] == [e.step.unit for e in events if isinstance(e.step, Read)]


def test_a_pass_that_leaves_units_out_is_learnt() -> None:
    mover = FakeMover(2)
    with executor(mover) as runner:
        for _ in range(5):
            runner.begin_pass()
            visit(runner, "a", "b", "d", "e", "f")
            runner.end_pass()
        assert runner.statistics().restarts == 1
        visit(runner, *UNITS)  # and what was left out comes back


def test_a_unit_that_runs_several_times_is_learnt() -> None:
    with executor(FakeMover(2)) as runner:
        for _ in range(5):
            runner.begin_pass()
            visit(runner, "a", "c", "b", "c", "d", "c", "e", "f")
            runner.end_pass()
        before = runner.statistics().restarts
        runner.begin_pass()
        visit(runner, "a", "c", "b", "c", "d", "c", "e", "f")
        runner.end_pass()
        assert runner.statistics().restarts == before


def test_a_failed_read_reaches_the_model_and_does_not_stay() -> None:
    mover = FakeMover(2)
    mover.fails.add("d")
    with executor(mover) as runner:
        visit(runner, "a", "b", "c")
        with pytest.raises(offload.StorageError, match="gone"):
            runner.enter("d")
        runner.leave()
        mover.fails.clear()
        with pytest.raises(offload.StorageError):  # the lanes met it again before it was mended
            visit(runner, "d")
        visit(runner, "d", "e", "f", *UNITS)


def test_nothing_grows(tmp_path: Path) -> None:
    """Loads and passes leave no thread and no open file behind."""
    checkpoint = MODELS["llama"].save(tmp_path)
    ids = torch.tensor([[5, 6, 7]])

    def once() -> tuple[int, int]:
        with offload.load(checkpoint, exact=True, resident=0.25) as model, torch.no_grad():
            for _ in range(3):
                model(ids)
        gc.collect()
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    first = once()
    assert [once() for _ in range(3)] == [first] * 3
