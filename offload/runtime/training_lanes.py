"""The lanes of training: they walk the step tuple's reads ahead of the model, and write behind it.

    read lane        wait for what a read comes after, lease a slot, start it     as far ahead as rings have slots
    model's thread   take what arrived, change it in place, give it               the slot goes back when its write ends

On an accelerator there are more lanes, which do in threads of their own what the model's thread does otherwise (see
`runtime/beside.py`). A pass that repeats is walked on beyond its end, into the next one. When another one begins, what
was read ahead is dropped: nothing of it was changed.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from offload.io.buffers import Buffer, BufferPool, Interrupted, Lease
from offload.planner.schedule import Read, Schedule, Step, Upload
from offload.planner.training_steps import ReadCell, ReadShard
from offload.runtime.masters import STAGES, Masters
from offload.runtime.progress import MODEL, Progress, lanes
from offload.runtime.timeline import Timeline, now
from offload.tiers.cells import Cells, page
from offload.tiers.host import as_tensor
from offload.tiers.spill import Spill
from offload.tiers.statefile import StateFile

LOOSE = "(loose)"
_Key = tuple[str, str]  # "state" or "cells", and which


@dataclass(frozen=True, slots=True)
class Lane:
    """A thread that does some steps of every pass.

    Attributes:
        name: of the lane, see `planner.schedule.lane_of`.
        run: does a step, when what it comes after is done.
        is_ahead: it may begin the next pass before the model does.
    """

    name: str
    run: Callable[[Step], None]
    is_ahead: bool


class TrainingLanes:
    """Belongs to the model's thread. Shards that are kept in memory, and cells that are, do not pass here.

    Args:
        state, spill: where shards and cells are stored.
        cells: how cells lie.
        slots: depth of the ring of shards.
        timeline: receives spans and stalls.
    """

    def __init__(self, state: StateFile, spill: Spill, cells: Cells, slots: int, timeline: Timeline) -> None:
        self._state, self._spill, self._cells, self._timeline = state, spill, cells, timeline
        self._shards = {s.name: s for cell in cells.layouts.values() for s in cell.shards}
        self.nbytes = {name: state.nbytes(name) for name in self._shards}
        self.ring = BufferPool(max(1, min(slots, len(self.nbytes))), max(self.nbytes.values(), default=0))
        self.ring.buffer.touch()  # what the first step takes is measured, and it need not use every slot
        self.cell_ring: BufferPool | None = None
        self._aside: BufferPool | None = None
        self.kept: dict[str, memoryview] = {}  # shards that stay in memory
        self._crossing: frozenset[str] = frozenset()
        self._pinned: list[Buffer] = []  # of what crosses
        self._masters: Masters | None = None
        self.progress = Progress()
        self._lanes = [Lane("read", self._read, is_ahead=True)]
        self._pools: list[BufferPool] = []
        self._drop: Callable[[], None] = lambda: None
        self._arrived: dict[_Key, deque[tuple[Read, Lease, Future[int]]]] = {}  # bounded by the rings
        self._schedule: Schedule = ()
        self._repeats = False
        self._threads: list[threading.Thread] = []

    def split(self, beside: Sequence[Lane], pools: Sequence[BufferPool], drop: Callable[[], None]) -> None:
        """Lanes do from now on what the model's thread did.

        Args:
            pools: other rings in whose slots they work.
            drop: gives back what they have prepared and nobody will take.
        """
        self._lanes += beside
        self._pools += pools
        self._drop = drop

    def pin(self, names: Collection[str]) -> None:
        """The state of these shards crosses a link from now on. None is kept yet."""
        assert not self.kept
        self._crossing = frozenset(names)
        if names:
            self._pinned.append(self.ring.buffer)
            self._cells.pins.add(self.ring.buffer)

    def use_cell_ring(self, slots: int, nbytes: int) -> None:
        """Makes the ring of cells. No pass is under way."""
        self.rest()
        self._end_cell_ring()
        self.cell_ring = BufferPool(slots, nbytes) if slots else None
        if self.cell_ring is not None:
            self.cell_ring.buffer.touch()
            self._cells.pins.add(self.cell_ring.buffer)

    def use_aside(self, slots: int) -> None:
        """Makes memory for weights of cells that keep their gradients, for so many at once. No pass is under way."""
        self.rest()
        if self._aside is None and slots:
            largest = max(cell.nbytes for unit, cell in self._cells.layouts.items() if unit != LOOSE)
            self._aside = BufferPool(slots, page(largest))
            self._aside.buffer.touch()
            self._cells.pins.add(self._aside.buffer)
            self._pools.append(self._aside)

    def lease_aside(self) -> Lease:
        """Waits for a place for the weights of one cell."""
        assert self._aside is not None
        return self._aside.lease()

    @property
    def is_running(self) -> bool:
        """Whether lanes are at work, or wait for the next pass."""
        return bool(self._threads)

    @property
    def staging_nbytes(self) -> int:
        """What reading masters will take, where nothing has been read of them yet."""
        return 0 if self._masters is not None else 4 * STAGES * max((s.count for s in self._shards.values()), default=0)

    @property
    def ring_nbytes(self) -> int:
        """Of all rings."""
        rings = [r for r in (self.ring, self.cell_ring, self._aside) if r is not None]
        return sum(r.buffer.nbytes for r in rings) + (self._masters.nbytes if self._masters is not None else 0)

    # Passes.

    def begin(self, schedule: Schedule, *, repeats: bool, at: int = 0) -> None:
        """The model begins a pass.

        Args:
            repeats: the same pass is likely to come next.
            at: the step to begin with; one before it is done.
        """
        if schedule is self._schedule and self._repeats and at == 0 and self._threads:
            self.progress.again()
            return
        self.rest()
        self._schedule, self._repeats = schedule, repeats
        self.progress.start(schedule, at, splits=len(self._lanes) > 1)
        names = lanes(schedule)
        for lane in self._lanes:
            steps = [step for step, name in zip(schedule, names, strict=True) if name == lane.name]
            if steps:
                run = (lane, steps, self.progress.number, at)
                thread = threading.Thread(target=self._walk, args=run, name=f"offload-{lane.name}", daemon=True)
                self._threads.append(thread)
                thread.start()

    def done(self, at: int) -> None:
        """The model's steps before this one are done, or, if they are writes, have begun."""
        self.progress.move(MODEL, self.progress.number, at)

    def rest(self) -> None:
        """Stops reading and gives back what was read ahead."""
        if not self._threads:
            return
        progress = self.progress
        with progress.changed:
            progress.is_stopping = True
            progress.changed.notify_all()
        pools = [p for p in (self.ring, self.cell_ring, self._masters, *self._pools) if p is not None]
        for pool in pools:
            pool.interrupt()
        for thread in self._threads:
            thread.join()
        for arrivals in self._arrived.values():
            for _, lease, future in arrivals:
                future.exception()
                lease.release()
        self._arrived.clear()
        self._drop()
        for pool in pools:
            pool.resume()
        self._threads.clear()
        self._schedule = ()
        with progress.changed:
            progress.is_stopping = False
            failure, progress.failure = progress.failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Stops reading, waits for what is in flight and frees the memory."""
        with contextlib.suppress(Exception):  # whoever needed the bytes was told, or nobody needs them any more
            self.rest()
        if self._masters is not None:
            self._masters.close()
        self._state.drain()
        self._spill.close()
        for buffer in self._pinned:
            self._cells.pins.remove(buffer)
        self._pinned.clear()
        self.ring.close()
        if self._aside is not None:
            self._cells.pins.remove(self._aside.buffer)
            self._aside.close()
        self._end_cell_ring()

    # What the model's thread asks for.

    def take_shard(self, name: str) -> tuple[memoryview, Lease | None]:
        """Waits for a shard; its bytes are those that were given last, or a CheckpointError says that they are not."""
        if name in self.kept:
            return self.kept[name], None
        _, lease = self._wait(("state", name))
        view = lease.view[: self.nbytes[name]]
        self._state.verify(name, view)
        return view, lease

    def give_shard(self, name: str, lease: Lease, generation: int) -> None:
        """Writes a shard back; its slot is free when that is done."""
        nbytes = self.nbytes[name]
        start, future = now(), self._state.write(name, lease.view[:nbytes], generation)
        future.add_done_callback(self._written(name, start, nbytes, lease))

    def take_cell(self, unit: str) -> Lease:
        """Waits for a cell. What was written in this run is compared with what comes back."""
        step, lease = self._wait(("cells", unit))
        assert isinstance(step, ReadCell)
        if step.what in ("gradient", "weights"):
            self._spill.verify(unit, lease.view)
        return lease

    def give_cell(self, unit: str, lease: Lease) -> None:
        """Writes a cell; its slot is free when that is done."""
        nbytes = page(self._cells.layouts[unit].nbytes)
        start, future = now(), self._spill.write(unit, lease.view)
        future.add_done_callback(self._written(unit, start, nbytes, lease))

    def make_shard(self, name: str, make: Callable[[memoryview], None]) -> None:
        """Writes a shard for the first time.

        Args:
            make: fills its bytes.
        """
        lease = self.ring.lease()
        view = lease.view[: self.nbytes[name]]
        make(view)
        self._state.write(name, view, 0).add_done_callback(lambda _: lease.release())

    def look(self, see: Callable[[str, memoryview], None]) -> None:
        """Reads every shard once and checks it. No pass is under way.

        Args:
            see: gets a shard's bytes, for as long as it runs.
        """
        ahead: deque[tuple[str, Lease, Future[int]]] = deque()
        names = deque(self.nbytes)
        while names or ahead:
            while names and (lease := self.ring.try_lease()) is not None:
                name = names.popleft()
                ahead.append((name, lease, self._state.read(name, lease.view)))
            name, lease, future = ahead.popleft()
            future.result()
            view = lease.view[: self.nbytes[name]]  # a shard's room may be larger
            self._state.verify(name, view)
            see(name, view)
            lease.release()

    def weights(self, unit: str, view: memoryview) -> Future[int]:
        """Starts filling memory with a cell's weights, out of the masters. No pass is under way."""
        cell = self._cells.layouts[unit]
        return self._masters_of().load(cell.shards, as_tensor(view)[: cell.nbytes])

    def keep(self, name: str) -> None:
        """Reads a shard that stays in memory from now on. No pass is under way."""
        buffer = Buffer(self.nbytes[name])
        self._state.read(name, buffer.view).result()
        self._state.verify(name, buffer.view)
        self.kept[name] = buffer.view
        if name in self._crossing:
            self._pinned.append(buffer)
            self._cells.pins.add(buffer)

    # Lanes.

    def _walk(self, lane: Lane, steps: Sequence[Step], number: int, at: int) -> None:
        """A lane: its steps in order; in the first pass only those from `at` on, and what every visit needs."""
        first, size, progress = number, len(self._schedule), self.progress
        try:
            while number == first or self._repeats:
                for step in steps:
                    always = isinstance(step, Upload) and step.unit == LOOSE
                    if number > first or step.index >= at or always:
                        progress.wait(step, number, is_ahead=lane.is_ahead)
                        lane.run(step)
                    progress.move(lane.name, number, step.index + 1)
                progress.move(lane.name, number, size)
                number += 1
        except Interrupted:
            return
        except BaseException as error:
            progress.fail(error)

    def _read(self, step: Step) -> None:
        assert isinstance(step, Read)
        if isinstance(step, ReadShard):
            key, ring = ("state", step.shard), self.ring
        else:
            assert self.cell_ring is not None
            key, ring = ("cells", step.unit), self.cell_ring
        lease, start = ring.lease(), now()
        try:
            future = self._start(step, lease)
        except BaseException:
            lease.release()
            raise
        future.add_done_callback(lambda _: self._timeline.add("read", key[1], start, now(), step.nbytes))
        with self.progress.changed:
            self._arrived.setdefault(key, deque()).append((step, lease, future))
            self.progress.changed.notify_all()

    def _start(self, step: Read, lease: Lease) -> Future[int]:
        if isinstance(step, ReadShard):
            return self._state.read(step.shard, lease.view)
        assert isinstance(step, ReadCell)
        if step.what == "nothing":
            none: Future[int] = Future()
            none.set_result(0)
            return none
        if step.what != "masters":
            return self._spill.read(step.unit, lease.view)
        cell = self._cells.layouts[step.unit]
        return self._masters_of().load(cell.shards, as_tensor(lease.view)[: cell.nbytes])

    def _wait(self, key: _Key) -> tuple[Read, Lease]:
        start = now()
        progress = self.progress
        with progress.changed:
            progress.changed.wait_for(
                lambda: self._arrived.get(key) or progress.failure is not None or progress.is_stopping
            )
            if not self._arrived.get(key):
                raise progress.failure or Interrupted("the lane is stopping")
            step, lease, future = self._arrived[key].popleft()
        try:
            future.result()
        except BaseException:
            lease.release()
            raise
        self._timeline.stall(f"{MODEL if len(self._lanes) == 1 else 'update'}:read", key[1], start, now())
        return step, lease

    def _masters_of(self) -> Masters:
        if self._masters is None:
            self._masters = Masters(self._state, self.kept, max(s.count for s in self._shards.values()))
        return self._masters

    def _end_cell_ring(self) -> None:
        if self.cell_ring is not None:
            self._cells.pins.remove(self.cell_ring.buffer)
            self.cell_ring.close()

    def _written(self, name: str, start: float, nbytes: int, lease: Lease) -> Callable[[Future[int]], None]:
        def ended(_: Future[int]) -> None:
            self._timeline.add("write", name, start, now(), nbytes)
            lease.release()

        return ended
