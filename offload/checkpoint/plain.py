"""A model's parameters without torch: what `describe` asks of a module tree and of its sources, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from offload.checkpoint.decoders import Shape


class Dtype(NamedTuple):
    """An element type: its name in torch, and its bytes."""

    name: str
    itemsize: int

    def __str__(self) -> str:
        return self.name


class Plain(NamedTuple):
    """A tensor and what it is stored as: what `describe` asks of a Source."""

    dtype: Dtype
    shape: Shape
    pieces: tuple[int, ...]
    slot_nbytes: int
    staged_nbytes: int = 0
    form: None = None
    is_stored_packed: bool = False

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def read_nbytes(self) -> int:
        return sum(self.pieces)

    @property
    def unpacked(self) -> Plain:
        return self


class Group(NamedTuple):
    """A unit: its name and its tensors'."""

    name: str
    tensors: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layers:
    """A model's parameters, divided as `runtime.discovery` divides them."""

    units: tuple[Group, ...]
    loose: tuple[str, ...]
    tables: frozenset[str]
    linears: frozenset[str]
    transposed: frozenset[str] = frozenset()
