"""Cells: one area for each unit, which holds its weights until the backward pass and its gradient after it.

Both have the same dtype and shape, and neither is needed while the other is: the weight of a parameter is used up when
its gradient is there, and the optimizer makes the next weight out of the gradient and its own state. So training takes
the bytes of one copy of the weights, not of two.

    one cell:  | matrices of a dtype | its vectors | matrices of another dtype | ...        each cut into shards

What the optimizer updates at a time is a shard: a run of one cell's elements, all of one dtype and all with weight
decay or all without. Where an optimizer's numbers follow from rows and columns, a shard is whole rows of one matrix.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from offload.io.buffers import Buffer
from offload.tiers.host import as_tensor
from offload.tiers.pins import Pins
from offload.units import MIB

ALIGNMENT = 256  # elements: what blocks of 8-bit states have, and a multiple of what every kernel computes at a time
SHARD_COUNT = 2 * MIB  # parameters of a shard at most: 24 MiB of float32 master and moments

Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a parameter lies in its cell: its first byte, and its elements with the padding behind them."""

    at: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    padded: int

    def of(self, cell: torch.Tensor) -> torch.Tensor:
        """The parameter, as a view of the cell's bytes."""
        nbytes = prod(self.shape) * self.dtype.itemsize
        return cell[self.at : self.at + nbytes].view(self.dtype).view(self.shape)

    def padded_of(self, cell: torch.Tensor) -> torch.Tensor:
        """The same with its padding, which is zeros, in one dimension."""
        return cell[self.at : self.at + self.padded * self.dtype.itemsize].view(self.dtype)


@dataclass(frozen=True, slots=True)
class Shard:
    """What the optimizer updates at a time.

    Attributes:
        name: unique; says where it is for people.
        unit: whose cell it is part of.
        at: its first byte there.
        shape: [count], a multiple of ALIGNMENT; or, of shards that follow parameters, [rows, columns] and [length].
        decays: whether weight decay applies: to matrices, not to norms and biases.
    """

    name: str
    unit: str
    at: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    decays: bool

    @property
    def count(self) -> int:
        """Elements."""
        return prod(self.shape)

    def of(self, cell: torch.Tensor) -> torch.Tensor:
        """Its elements, as a view of the cell's bytes."""
        return cell[self.at : self.at + self.count * self.dtype.itemsize].view(self.dtype).view(self.shape)


@dataclass(frozen=True, slots=True)
class Cell:
    """How the parameters of one unit lie side by side."""

    unit: str
    places: Mapping[str, Place]
    shards: tuple[Shard, ...]
    nbytes: int


def lay_out_cell(unit: str, parameters: Shapes, shard_count: int = SHARD_COUNT, *, whole_rows: bool = False) -> Cell:
    """Puts matrices before vectors, dtype by dtype, in the order of `parameters`, and cuts them into shards.

    Args:
        shard_count: elements of a shard at most; of whole rows, one row at least.
        whole_rows: a shard is rows of one matrix (of more dimensions, all but the last are rows), or one vector.
    """
    assert shard_count % ALIGNMENT == 0, shard_count
    kinds: dict[tuple[torch.dtype, bool], list[str]] = {}
    for name, (dtype, shape) in parameters.items():
        kinds.setdefault((dtype, len(shape) >= 2), []).append(name)
    places: dict[str, Place] = {}
    shards: list[Shard] = []
    end = 0
    for (dtype, decays), names in kinds.items():
        start = end
        for name in names:
            shape = parameters[name][1]
            padded = -(-prod(shape) // ALIGNMENT) * ALIGNMENT
            places[name] = Place(end, dtype, shape, padded)
            end += padded * dtype.itemsize
        runs = [((end - start) // dtype.itemsize, 1, start)]
        if whole_rows:
            runs = [_rows(places[name]) for name in names]
        for rows, columns, at in runs:
            each = max(1, shard_count // columns)
            for first in range(0, rows, each):
                shape = (min(each, rows - first), columns) if whole_rows and decays else (min(each, rows - first),)
                begin = at + first * columns * dtype.itemsize
                shards.append(Shard(f"{unit}[{len(shards)}]", unit, begin, dtype, shape, decays))
    return Cell(unit, places, tuple(shards), end)


def _rows(place: Place) -> tuple[int, int, int]:
    """Rows, columns and first byte of a parameter."""
    columns = max(1, place.shape[-1]) if len(place.shape) >= 2 else 1
    return prod(place.shape) // columns, columns, place.at


class Cells:
    """The memory of cells, in huge pages, and the parameters as views of it.

    A cell stays in memory, or is lent a slot of somebody's ring for the time of its use.

    Attributes:
        views: parameter name -> its tensor, of cells that are in memory now.

    Args:
        kept: cells that stay; None: all.
        pins: of the device that computes.
    """

    def __init__(self, cells: Sequence[Cell], kept: Collection[str] | None = None, pins: Pins | None = None) -> None:
        self.pins = pins or Pins()
        self.layouts = {cell.unit: cell for cell in cells}
        self.views: dict[str, torch.Tensor] = {}
        self._areas: dict[str, torch.Tensor] = {}
        self._kept: dict[str, Buffer] = {}
        for cell in cells:
            if kept is None or cell.unit in kept:
                self.keep(cell.unit)

    @property
    def nbytes(self) -> int:
        """Of the cells that stay."""
        return sum(buffer.nbytes for buffer in self._kept.values())

    def stays(self, unit: str) -> bool:
        return unit in self._kept

    def keep(self, unit: str) -> memoryview:
        """Takes memory for a cell that stays from now on; returns it, to be filled."""
        self._kept[unit] = buffer = Buffer(page(self.layouts[unit].nbytes))
        self.pins.add(buffer)
        self.lend(unit, buffer.view)
        return buffer.view

    def drop(self, unit: str) -> None:
        """Gives up the memory of a cell, which ends with the last view of it."""
        buffer = self._kept.pop(unit)
        self.take_back(unit)
        self.pins.remove(buffer)
        buffer.close()

    def memory(self, unit: str) -> memoryview:
        """Of a cell that stays."""
        return self._kept[unit].view

    def lend(self, unit: str, view: memoryview) -> None:
        """The cell lies here from now on; one that stays keeps what it has in its own memory."""
        cell = self.layouts[unit]
        self._areas[unit] = area = as_tensor(view)[: cell.nbytes]
        self.views |= {name: place.of(area) for name, place in cell.places.items()}
        for place in cell.places.values():  # no shard need hold the padding
            place.padded_of(area)[prod(place.shape) :].zero_()

    def take_back(self, unit: str) -> None:
        """The cell is not in memory any more, or in its own again."""
        if unit in self._kept:
            self.lend(unit, self._kept[unit].view)
            return
        del self._areas[unit]
        for name in self.layouts[unit].places:
            del self.views[name]

    def has(self, unit: str) -> bool:
        """Whether it is in memory now."""
        return unit in self._areas

    def area(self, unit: str) -> torch.Tensor:
        """Its bytes, while it is in memory."""
        return self._areas[unit]

    def shard(self, shard: Shard) -> torch.Tensor:
        """The elements of a shard, weights or gradient, as they are in its cell."""
        return shard.of(self._areas[shard.unit])

    def own(self, shard: Shard) -> torch.Tensor:
        """The same of a cell that stays, in its own memory, wherever it has been lent a place."""
        return shard.of(as_tensor(self._kept[shard.unit].view))

    def padded(self, unit: str) -> Iterable[tuple[str, torch.Tensor]]:
        """Every parameter of a unit with its padding, in one dimension."""
        return [(name, place.padded_of(self._areas[unit])) for name, place in self.layouts[unit].places.items()]

    def close(self) -> None:
        """Lets go of the memory, which ends with the last view of it: a user may still hold one."""
        self.views.clear()
        self._areas.clear()
        for buffer in self._kept.values():
            self.pins.remove(buffer)
        self._kept.clear()


def page(nbytes: int) -> int:
    """Rounded up to whole pages."""
    return -(-nbytes // 4096) * 4096
