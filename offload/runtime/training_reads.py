"""The reads of training: what the read lane starts, and what has arrived for whoever needs it.

Bytes that come back are those that were given last, or an error says that they are not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from offload.io.buffers import BufferPool, Interrupted, Lease
from offload.planner.schedule import Read, Step
from offload.planner.training_steps import ReadCell, ReadShard
from offload.runtime.kept_state import KeptState
from offload.runtime.masters import STAGES, Masters
from offload.runtime.progress import Progress
from offload.runtime.timeline import Timeline, now
from offload.runtime.training_rings import TrainingRings
from offload.tiers.cells import Cells
from offload.tiers.host import as_tensor
from offload.tiers.spill import Spill
from offload.tiers.statefile import StateFile

_Key = tuple[str, str]  # "state" or "cells", and which


class TrainingReads:
    """Args:
    state, spill: where shards and cells are stored.
    cells: how cells lie.
    rings: where they are read to.
    kept: shards that stay in memory, which are not read.
    progress: is notified of what arrives, and ends waits for it.
    timeline: receives spans and stalls.
    """

    def __init__(
        self,
        state: StateFile,
        spill: Spill,
        cells: Cells,
        rings: TrainingRings,
        kept: KeptState,
        progress: Progress,
        timeline: Timeline,
    ) -> None:
        self._state, self._spill, self._cells, self._rings, self._kept = state, spill, cells, rings, kept
        self._progress, self._timeline = progress, timeline
        self._shards = {s.name: s.count for cell in cells.layouts.values() for s in cell.shards}
        self._largest = max(self._shards.values(), default=0)
        self._masters: Masters | None = None
        self._arrived: dict[_Key, deque[tuple[Read, Lease, Future[int]]]] = {}  # bounded by the rings

    # The read lane.

    def start(self, step: Step) -> None:
        """Waits for a slot and begins a read."""
        assert isinstance(step, Read)
        if isinstance(step, ReadShard):
            key, ring = ("state", step.shard), self._rings.state
        else:
            assert self._rings.cells is not None
            key, ring = ("cells", step.unit), self._rings.cells
        lease, start = ring.lease(), now()
        try:
            future = self._begin(step, lease)
        except BaseException:
            lease.release()
            raise
        future.add_done_callback(lambda _: self._timeline.add("read", key[1], start, now(), step.nbytes))
        with self._progress.changed:
            self._arrived.setdefault(key, deque()).append((step, lease, future))
            self._progress.changed.notify_all()

    def drop(self) -> None:
        """The lanes have stopped: gives back what nobody has taken, when it has arrived."""
        for arrivals in self._arrived.values():
            for _, lease, future in arrivals:
                future.exception()
                lease.release()
        self._arrived.clear()

    # Whoever needs it.

    def take_shard(self, name: str, lane: str) -> tuple[memoryview, Lease | None]:
        """Waits for a shard; returns its bytes, and the slot that they lie in unless the shard stays in memory.

        Args:
            lane: who waits, for the timeline.

        Raises:
            CheckpointError: its bytes are not those that were given last.
        """
        if name in self._kept.views:
            return self._kept.views[name], None
        _, lease = self._wait(("state", name), lane)
        view = lease.view[: self._state.nbytes(name)]
        self._state.verify(name, view)
        return view, lease

    def take_cell(self, unit: str, lane: str) -> Lease:
        """Waits for a cell. What was written in this run is compared with what comes back.

        Args:
            lane: who waits, for the timeline.
        """
        step, lease = self._wait(("cells", unit), lane)
        assert isinstance(step, ReadCell)
        if step.what in ("gradient", "weights"):
            self._spill.verify(unit, lease.view)
        return lease

    # Between passes.

    def look(self, see: Callable[[str, memoryview], None]) -> None:
        """Reads every shard once and checks it.

        Args:
            see: gets a shard's bytes, for as long as it runs.
        """
        ahead: deque[tuple[str, Lease, Future[int]]] = deque()
        names = deque(self._shards)
        while names or ahead:
            while names and (lease := self._rings.state.try_lease()) is not None:
                name = names.popleft()
                ahead.append((name, lease, self._state.read(name, lease.view)))
            name, lease, future = ahead.popleft()
            future.result()
            view = lease.view[: self._state.nbytes(name)]  # a shard's room may be larger
            self._state.verify(name, view)
            see(name, view)
            lease.release()

    def weights(self, unit: str, view: memoryview) -> Future[int]:
        """Starts filling memory with a cell's weights, out of the masters."""
        cell = self._cells.layouts[unit]
        return self._masters_of().load(cell.shards, as_tensor(view)[: cell.nbytes])

    # Memory.

    @property
    def pools(self) -> Sequence[BufferPool | Masters]:
        """What the read lane may wait for room in, beside rings."""
        return [self._masters] if self._masters is not None else []

    @property
    def nbytes(self) -> int:
        """Of what masters are read to."""
        return self._masters.nbytes if self._masters is not None else 0

    @property
    def staging_nbytes(self) -> int:
        """The same as it will be, where nothing has been read of them yet."""
        return 0 if self._masters is not None else 4 * STAGES * self._largest

    def close(self) -> None:
        """Waits for what is on its way."""
        if self._masters is not None:
            self._masters.close()

    def _begin(self, step: Read, lease: Lease) -> Future[int]:
        if isinstance(step, ReadShard):
            return self._state.read(step.shard, lease.view)
        assert isinstance(step, ReadCell)
        if step.what == "nothing":
            none: Future[int] = Future()
            none.set_result(0)
            return none
        if step.what != "masters":
            return self._spill.read(step.unit, lease.view)
        return self.weights(step.unit, lease.view)

    def _wait(self, key: _Key, lane: str) -> tuple[Read, Lease]:
        start = now()
        progress = self._progress
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
        self._timeline.stall(f"{lane}:read", key[1], start, now())
        return step, lease

    def _masters_of(self) -> Masters:
        if self._masters is None:
            self._masters = Masters(self._state, self._kept.views, self._largest)
        return self._masters
