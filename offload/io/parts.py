"""Memory that a transfer goes through from one part to the next: neighbours in a file may lie apart in memory."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from offload.io.addresses import address_of


class Part(NamedTuple):
    """A run of bytes in memory, and the address of the first."""

    view: memoryview
    address: int


class Parts:
    """The memory of one request.

    Args:
        views: contiguous, of bytes; lent for as long as this is used.

    Attributes:
        nbytes: of all of them.
    """

    __slots__ = ("_begins", "_parts", "nbytes")

    def __init__(self, views: Sequence[memoryview]) -> None:
        self._parts = [Part(view, address_of(view)) for view in views]
        self._begins: list[int] = []
        self.nbytes = 0
        for view in views:
            self._begins.append(self.nbytes)
            self.nbytes += view.nbytes

    def has_multiples_of(self, alignment: int) -> bool:
        """Every part begins at one and has a length that is one."""
        return not any((part.address | part.view.nbytes) % alignment for part in self._parts)

    def cut(self, begin: int, end: int) -> Sequence[Part]:
        """Bytes `begin` to `end`, counted over all parts."""
        found = []
        for k in range(bisect_right(self._begins, begin) - 1, len(self._parts)):
            view, address = self._parts[k]
            first, last = max(0, begin - self._begins[k]), min(view.nbytes, end - self._begins[k])
            if last <= first:
                break
            found.append(Part(view[first:last], address + first))
        return found

    def __str__(self) -> str:
        return ", ".join(f"{part.view.nbytes} at {part.address:#x}" for part in self._parts)


NOTHING = Parts([])
