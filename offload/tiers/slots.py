"""How much of a slot a tensor needs, and which of its stored pieces are read straight to their places in it.

Direct I/O moves whole pages: a piece can be read to its place only where it lies in pages of memory as in those of the
file. One shift of a tensor's first byte does that for all pieces whose sizes are whole pages, as those of most experts
are. What is left at both ends of such a piece shares its page with a neighbour in the file, and is copied.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from offload.io.extents import ALIGNMENT, Extent
from offload.units import KIB

OVERHEAD = 3 * ALIGNMENT  # of one extent in a slot, at most: rounding at both ends and one hole
VIEW_ALIGNMENT = 64
ANYWHERE = 2  # bytes of an element, at most, whose products are the same bits wherever the first one lies
WORTH = 256 * KIB  # of whole pages: less is copied sooner than the disk is asked for it


class Run(NamedTuple):
    """Neighbours in a file that are neighbours in a tensor: where they lie, and at which byte of the tensor."""

    extent: Extent
    at: int

    @property
    def pages(self) -> Extent:
        """The whole pages of the file in it; may have no bytes."""
        begin, end = round_up(self.extent.offset, ALIGNMENT), self.extent.end // ALIGNMENT * ALIGNMENT
        return Extent(self.extent.path, begin, max(0, end - begin))

    @property
    def shift(self) -> int:
        """Where in a page the tensor must begin for these to lie in memory as in the file."""
        return (self.extent.offset - self.at) % ALIGNMENT


class Way(NamedTuple):
    """How a tensor comes to a slot.

    Attributes:
        runs: all of it.
        members: of each stored piece, the run that it is part of.
        shift: where in a page it begins; None: anywhere, since all of it is copied.
    """

    runs: tuple[Run, ...]
    members: tuple[int, ...]
    shift: int | None

    def is_direct(self, run: Run) -> bool:
        """Whether a run's whole pages are read to their place."""
        return run.shift == self.shift and run.pages.nbytes >= WORTH

    @property
    def staged_nbytes(self) -> int:
        """Bytes that are read beside their place, but for the ends of direct runs."""
        return sum(run.extent.nbytes for run in self.runs if not self.is_direct(run))


def way_of(pieces: Iterable[Run], itemsize: int, *, as_stored: bool) -> Way:
    """How a tensor that is no view into its file comes to a slot.

    Args:
        pieces: in the order of the tensor.
        itemsize: of its elements, in bytes; it begins at a multiple of that.
        as_stored: its bytes are stored as they are used.
    """
    runs: list[Run] = []
    members: list[int] = []
    for extent, at in pieces:
        last = runs[-1] if runs else None
        if last and last.extent.path == extent.path and last.extent.end == extent.offset:
            runs[-1] = Run(Extent(extent.path, last.extent.offset, last.extent.nbytes + extent.nbytes), last.at)
        else:
            runs.append(Run(extent, at))
        members.append(len(runs) - 1)
    shifts: Counter[int] = Counter()
    for run in runs if as_stored and itemsize <= ANYWHERE else ():
        if run.pages.nbytes >= WORTH and run.shift % itemsize == 0:
            shifts[run.shift] += run.extent.nbytes
    return Way(tuple(runs), tuple(members), shifts.most_common(1)[0][0] if shifts else None)


def slot_nbytes(nbytes: int, way: Way | None) -> int:
    """Bytes of a slot that a tensor needs at most.

    Args:
        nbytes: in memory.
        way: None: a view into the bytes of the file is the tensor; else parts of it are copied from beside it.
    """
    if way is None:
        return nbytes + OVERHEAD
    staged = sum((0 if way.is_direct(run) else run.extent.nbytes) + OVERHEAD for run in way.runs)
    return round_up(nbytes, VIEW_ALIGNMENT) + staged + (2 * ALIGNMENT if way.shift is None else 3 * ALIGNMENT)


def round_up(n: int, to: int) -> int:
    """The next multiple of `to`."""
    return -(-n // to) * to
