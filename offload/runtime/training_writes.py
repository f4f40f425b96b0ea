"""The writes of training: shards and cells in slots of rings, which go back when a write has ended."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from offload.io.buffers import Lease
from offload.runtime.timeline import Timeline, now
from offload.runtime.training_rings import TrainingRings
from offload.tiers.cells import Cells, page
from offload.tiers.spill import Spill
from offload.tiers.statefile import StateFile


class TrainingWrites:
    """Args:
    state, spill: where shards and cells are stored.
    cells: how cells lie.
    rings: lend slots to first writes.
    timeline: receives spans.
    """

    def __init__(self, state: StateFile, spill: Spill, cells: Cells, rings: TrainingRings, timeline: Timeline) -> None:
        self._state, self._spill, self._cells, self._rings = state, spill, cells, rings
        self._timeline = timeline

    def give_shard(self, name: str, lease: Lease, generation: int) -> None:
        """Writes a shard back."""
        nbytes = self._state.nbytes(name)
        start, future = now(), self._state.write(name, lease.view[:nbytes], generation)
        future.add_done_callback(self._written(name, start, nbytes, lease))

    def give_cell(self, unit: str, lease: Lease) -> None:
        """Writes a cell."""
        nbytes = page(self._cells.layouts[unit].nbytes)
        start, future = now(), self._spill.write(unit, lease.view)
        future.add_done_callback(self._written(unit, start, nbytes, lease))

    def make_shard(self, name: str, make: Callable[[memoryview], None]) -> None:
        """Writes a shard for the first time.

        Args:
            make: fills its bytes.
        """
        lease = self._rings.state.lease()
        view = lease.view[: self._state.nbytes(name)]
        make(view)
        self._state.write(name, view, 0).add_done_callback(lambda _: lease.release())

    def _written(self, name: str, start: float, nbytes: int, lease: Lease) -> Callable[[Future[int]], None]:
        def ended(_: Future[int]) -> None:
            self._timeline.add("write", name, start, now(), nbytes)
            lease.release()

        return ended
