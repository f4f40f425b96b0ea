"""What stays in memory between its uses in training: graphs, optimizer state and cells, as memory is left for them."""

from __future__ import annotations

from collections.abc import Collection

from offload.runtime.backprop import Backprop
from offload.runtime.parameters import Parameters
from offload.runtime.training_lanes import LOOSE, TrainingLanes
from offload.runtime.training_walk import Walk
from offload.runtime.tuples import Tuples
from offload.tiers.cells import Cells
from offload.tiers.spill import Spill


class Holdings:
    """Changes it, between passes."""

    def __init__(
        self,
        backprop: Backprop,
        cells: Cells,
        lanes: TrainingLanes,
        walk: Walk,
        parameters: Parameters,
        spill: Spill,
        tuples: Tuples,
    ) -> None:
        self._backprop, self._cells, self._lanes, self._walk = backprop, cells, lanes, walk
        self._parameters, self._spill, self._tuples = parameters, spill, tuples

    def keep_graphs(self, nbytes: int, micro_batches: int) -> int:
        """Keeps the graphs of as many units as fit, the last ones first; returns the bytes that they take.

        Of units whose weights stay: a graph refers to them.
        """
        taken = 0
        for unit in reversed(self._backprop.order):
            part = self._backprop.parts[unit]
            is_last = unit == self._backprop.order[-1]  # its backward follows at once: its graph is there anyway
            need = 0 if is_last else part.graph_nbytes * micro_batches
            part.keeps = taken + need <= nbytes and (is_last or not self._tuples.comes_twice(unit))
            taken += need if part.keeps else 0
        return taken

    def drop_state(self) -> None:
        """Keeps no shards in memory any more. No update is due."""
        self._lanes.rest()
        for name in [*self._lanes.kept.views]:
            self._lanes.kept.drop(name, self._walk.generation)
        self._tuples.forget()

    def keep_state(self, nbytes: int) -> int:
        """Keeps as many shards in memory as fit, spread evenly; returns the bytes that they take."""
        lanes, order = self._lanes, [LOOSE, *self._tuples.order]
        names = [s.name for unit in order if unit in self._cells.layouts for s in self._cells.layouts[unit].shards]
        share = min(1.0, nbytes / max(1, self.state_nbytes))
        taken = wanted = 0.0
        lanes.rest()
        for name in names:
            wanted += lanes.nbytes[name] * share
            if name in lanes.kept.views:
                taken += lanes.nbytes[name]
            elif taken + lanes.nbytes[name] / 2 <= wanted and taken + lanes.nbytes[name] <= nbytes:
                lanes.kept.keep(name)
                taken += lanes.nbytes[name]
        self._tuples.forget()
        return int(taken)

    def keep_cells(self, kept: Collection[str], cell_slots: tuple[int, int], *, is_due: bool, has_copies: bool) -> None:
        """Keeps these cells in memory from now on, and no others; those of no unit stay in any case.

        Args:
            cell_slots: depth of the ring for the others, and bytes of a slot.
            is_due: they hold gradients.
            has_copies: weights of cells that do not stay are stored.
        """
        self._lanes.rest()
        self._walk.put_away()
        for unit, cell in self._cells.layouts.items():
            if not cell.places:  # it has nothing to keep
                continue
            if self._cells.stays(unit) and unit not in kept and unit != LOOSE:
                if is_due or has_copies:
                    self._spill.write(unit, self._cells.memory(unit)).result()
                self._parameters.hide(self._cells.layouts[unit].places)
                self._cells.drop(unit)
                if unit not in self._backprop.order[-1:]:  # a graph refers to weights that would be gone
                    self._backprop.parts[unit].keeps = False
            elif unit in kept and not self._cells.stays(unit):
                view = self._cells.keep(unit)
                if is_due:
                    self._spill.read(unit, view).result()
                    self._spill.verify(unit, view)
                else:
                    self._lanes.reads.weights(unit, view).result()
                self._parameters.show({n: self._cells.views[n] for n in self._cells.layouts[unit].places})
        self._spill.drain()
        self._lanes.rings.use_cells(*cell_slots)
        self._tuples.forget()

    @property
    def state_nbytes(self) -> int:
        """Bytes of the optimizer's state, master weights included."""
        return sum(self._lanes.nbytes.values())
