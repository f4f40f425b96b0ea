"""The step tuples of one model in training: emitted from what stays in memory now, kept until that changes."""

from __future__ import annotations

from collections.abc import Sequence

from offload.planner.schedule import Schedule
from offload.planner.training import emit_training
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

    Attributes:
        order: see above; to be changed with `forget`.
        defers: state of cells that travel is written in the backward pass; see `TrainedUnit`.
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
    ) -> None:
        self._cells, self._lanes, self._there = cells, lanes, there
        self.order = list(order)
        self.clips, self.writes_copies = clips, writes_copies
        self.defers = False
        self._emitted: dict[tuple[bool, ...], Schedule] = {}

    def emit(self, is_due: bool, has_copies: bool, *, forward: bool, backward: bool) -> Schedule:
        """The steps of a pass; the same object every time.

        Args:
            is_due: every cell holds a gradient.
            has_copies: the weights of every cell that does not stay are stored.
            forward, backward: see `emit_training`.
        """
        key = (is_due, has_copies, forward, backward)
        if key not in self._emitted:
            self._emitted[key] = emit_training(
                [self._unit(u) for u in self.order],
                self._unit(LOOSE) if LOOSE in self._cells.layouts else None,
                clips=self.clips, is_due=is_due, reads="weights" if has_copies else "masters",
                writes_copies=self.writes_copies, forward=forward, backward=backward,
            )  # fmt: skip
        return self._emitted[key]

    def repeating(self) -> Schedule:
        """The steps of a step of training, as it will be from the second on."""
        return self.emit(self.clips, self.writes_copies, forward=True, backward=True)

    def forget(self) -> None:
        """The order of units has changed, or what stays in memory."""
        self._emitted.clear()

    def travels(self, unit: str) -> bool:
        """Whether a unit's cell does not stay in memory."""
        return bool(self._cells.layouts[unit].places) and not self._cells.stays(unit)

    def comes_twice(self, unit: str) -> bool:
        """Whether a unit's weights are not where it computes between its forward and its backward."""
        return self.travels(unit) if self._there is None else not self._there.stays(unit)

    def _unit(self, name: str) -> TrainedUnit:
        """A unit in the planner's words."""
        cell = self._cells.layouts[name]
        shards = tuple(
            TrainedShard(
                name=s.name, nbytes=self._lanes.nbytes[s.name], masters_nbytes=page(4 * s.count),
                stays=s.name in self._lanes.kept,
            )
            for s in cell.shards
        )  # fmt: skip
        there = self._there
        return TrainedUnit(
            name=name, nbytes=page(cell.nbytes), shards=shards, stays=not self.travels(name), defers=self.defers,
            uploads=there is not None, stays_there=there is not None and there.stays(name),
        )  # fmt: skip
