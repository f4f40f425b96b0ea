"""The step tuples of one model in training: emitted from what stays in memory now, kept until that changes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from offload.planner.schedule import Schedule
from offload.planner.training import deferring, emit_training
from offload.planner.training_steps import TrainedShard, TrainedUnit
from offload.runtime.training_lanes import LOOSE, TrainingLanes
from offload.tiers.cells import Cells, page
from offload.tiers.device_cells import DeviceCells


class Tuples:
    """Args:
        cells, lanes: say what stays in memory.
        order: units in which the model runs forward.
        clips: whether updates wait for the next forward pass.
        writes_copies: see `planner.training.has_copies`.
        there: cells on the accelerator that computes, if one does.
        going_up: shards that it updates.

    Attributes:
        order: see above; to be changed with `forget`.
        defers: the share of all state that is written in the backward pass; see `TrainedUnit`.
        holds_there: see `emit_training`.
    """

    def __init__(
        self,
        cells: Cells,
        lanes: TrainingLanes,
        order: Sequence[str],
        *,
        clips: bool,
        writes_copies: bool,
        there: DeviceCells | None = None,
        going_up: Collection[str] = (),
    ) -> None:
        self._cells, self._lanes, self._there, self._going_up = cells, lanes, there, frozenset(going_up)
        self.order = list(order)
        self.clips, self.writes_copies = clips, writes_copies
        self.defers = 0.0
        self.holds_there = False
        self._emitted: dict[tuple[bool, ...], Schedule] = {}
        self._resting: Mapping[str, tuple[str, ...]] | None = None

    def emit(
        self, is_due: bool, has_copies: bool, *, forward: bool, backward: bool, holds_there: bool | None = None
    ) -> Schedule:
        """The steps of a pass; the same object every time.

        Args:
            is_due: every cell holds a gradient.
            has_copies: the weights of every cell that does not stay are stored.
            forward, backward: see `emit_training`.
            holds_there: None: as it is now.
        """
        holds = self.holds_there if holds_there is None else holds_there
        key = (is_due, has_copies, forward, backward, holds)
        if key not in self._emitted:
            deferred = self._deferred()
            self._emitted[key] = emit_training(
                [self._unit(u, u in deferred) for u in self.order],
                self._unit(LOOSE) if LOOSE in self._cells.layouts else None,
                clips=self.clips, is_due=is_due, reads="weights" if has_copies else "masters",
                writes_copies=self.writes_copies, forward=forward, backward=backward, holds_there=holds,
            )  # fmt: skip
        return self._emitted[key]

    def repeating(self) -> Schedule:
        """The steps of a step of training, as it will be from the second on."""
        return self.emit(
            self.clips, self.writes_copies, forward=True, backward=True, holds_there=bool(self.resting)
        )  # fmt: skip

    @property
    def resting(self) -> Mapping[str, tuple[str, ...]]:
        """Unit -> its shards that are updated on the accelerator and stay there between passes."""
        if self._resting is None:
            units = [self._unit(name) for name in self._cells.layouts] if self._going_up else []
            found = {u.name: tuple(s.name for s in u.going_up) for u in units if u.rests_there}
            self._resting = {unit: shards for unit, shards in found.items() if shards}
        return self._resting

    def forget(self) -> None:
        """The order of units has changed, or what stays in memory."""
        self._emitted.clear()
        self._resting = None

    def travels(self, unit: str) -> bool:
        """Whether a unit's cell does not stay in memory."""
        return bool(self._cells.layouts[unit].places) and not self._cells.stays(unit)

    def comes_twice(self, unit: str) -> bool:
        """Whether a unit's weights are not where it computes between its forward and its backward."""
        if self._there is not None:
            return not self._there.stays(unit)
        return self.travels(unit) or unit in self._deferred()

    def _deferred(self) -> frozenset[str]:
        """Units whose state is written in the backward pass; that of the last one follows its forward at once."""
        shards = {u: self._cells.layouts[u].shards for u in self.order[:-1]}
        sizes = {u: sum(self._lanes.nbytes[s.name] for s in found) for u, found in shards.items()}
        return deferring(sizes, self.defers if self.clips else 0.0)

    def _unit(self, name: str, defers: bool = False) -> TrainedUnit:
        """A unit in the planner's words."""
        cell = self._cells.layouts[name]
        shards = tuple(
            TrainedShard(
                name=s.name, nbytes=self._lanes.nbytes[s.name], masters_nbytes=page(4 * s.count),
                stays=s.name in self._lanes.kept.views, goes_up=s.name in self._going_up,
                cell_nbytes=s.count * s.dtype.itemsize,
            )
            for s in cell.shards
        )  # fmt: skip
        there = self._there
        return TrainedUnit(
            name=name, nbytes=page(cell.nbytes), shards=shards, stays=not self.travels(name), defers=defers,
            uploads=there is not None, stays_there=there is not None and there.stays(name),
        )  # fmt: skip
