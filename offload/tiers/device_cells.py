"""Cells on an accelerator: weights go up, a gradient takes their place and comes down, all in one layout.

A cell lies there as it does in main memory, so that it crosses the link in one copy. It has a place of its own, or a
slot of a ring for the time of a visit.

    device memory:  | cell that has a place | ... | slot 0 | slot 1 | ...
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from offload.io.buffers import BufferPool
from offload.planner.cells import CellPlan
from offload.tiers.cells import Cell, page
from offload.tiers.device import Device


class DeviceCells:
    """Args:
        layouts: of all cells, by unit.
        device: where they lie; its memory is taken at once.
        plan: which have a place of their own, and the ring for the others.

    Attributes:
        views: parameter name -> its tensor, of cells that are shown now.
        ring: lends the slots by index; their memory is the device's.
        spare_nbytes: of the device's memory that a step leaves, for graphs.
    """

    def __init__(self, layouts: Mapping[str, Cell], device: Device, plan: CellPlan) -> None:
        self.layouts = dict(layouts)
        self.views: dict[str, torch.Tensor] = {}
        self.spare_nbytes = 0
        self.ring = BufferPool(max(1, plan.slots), 0)
        sizes = {u: page(cell.nbytes) for u, cell in layouts.items() if u in plan.kept}
        self.nbytes = sum(sizes.values()) + plan.slots * plan.slot_nbytes
        memory, end = device.allocate(self.nbytes), 0
        self._places: dict[str, torch.Tensor] = {}
        for unit, nbytes in sizes.items():
            self._places[unit] = memory[end : end + nbytes]
            end += nbytes
        self._slots = [memory[end + k * plan.slot_nbytes :][: plan.slot_nbytes] for k in range(plan.slots)]
        self._shown: dict[str, torch.Tensor] = {}
        self._known: dict[tuple[str, int | None], dict[str, torch.Tensor]] = {}

    def stays(self, unit: str) -> bool:
        """Whether a cell has a place of its own."""
        return unit in self._places

    def area(self, unit: str, slot: int | None) -> torch.Tensor:
        """A cell's bytes, in a slot or in its own place."""
        whole = self._places[unit] if slot is None else self._slots[slot]
        return whole[: self.layouts[unit].nbytes]

    def show(self, unit: str, slot: int | None) -> Mapping[str, torch.Tensor]:
        """The cell is used here from now on; returns its parameters, the same objects every time."""
        key, area = (unit, slot), self.area(unit, slot)
        if key not in self._known:
            self._known[key] = {name: place.of(area) for name, place in self.layouts[unit].places.items()}
        self._shown[unit] = area
        self.views |= self._known[key]
        return self._known[key]

    def hide(self, unit: str) -> None:
        """Nobody uses it for now."""
        del self._shown[unit]
        for name in self.layouts[unit].places:
            del self.views[name]

    def padded(self, unit: str) -> Iterable[tuple[str, torch.Tensor]]:
        """See Cells.padded."""
        return [(name, place.padded_of(self._shown[unit])) for name, place in self.layouts[unit].places.items()]

    def close(self) -> None:
        """Lets go of the memory."""
        self.views.clear()
        self._shown.clear()
        self._known.clear()
        self._places.clear()
        self._slots.clear()
        self.ring.close()
