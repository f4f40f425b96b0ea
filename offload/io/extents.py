"""Byte ranges of files, their aligned supersets, and the merging of neighbours into one read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT = 4096
"""Bytes. Direct I/O on nearly every disk is content with multiples of this."""


@dataclass(frozen=True, slots=True)
class Extent:
    """`nbytes` bytes of the file `path` from byte `offset`."""

    path: str
    offset: int
    nbytes: int

    @property
    def end(self) -> int:
        """The first byte after the extent."""
        return self.offset + self.nbytes

    def part(self, at: int, nbytes: int) -> Extent:
        """`nbytes` bytes from byte `at` of the extent."""
        return Extent(self.path, self.offset + at, nbytes)

    def aligned(self, alignment: int = ALIGNMENT) -> Extent:
        """The smallest aligned extent that holds this one; its end may lie past the end of the file.

        Args:
            alignment: bytes, at least 1; the result's offset and end are multiples of it.
        """
        begin = self.offset // alignment * alignment
        return Extent(self.path, begin, -(-self.end // alignment) * alignment - begin)


@dataclass(frozen=True, slots=True)
class Span:
    """One range to read for several extents: `members` are their indices in the input, in file order."""

    extent: Extent
    members: tuple[int, ...]


def coalesce(extents: Sequence[Extent], *, max_gap: int = 65536) -> list[Span]:
    """Merge extents of one file that lie at most `max_gap` bytes apart (touching and overlapping ones always).

    The spans come sorted by path and offset, hold every input index exactly once, and are not aligned.

    Args:
        extents: in any order, of any number of files; empty ones are kept.
        max_gap: bytes between two extents that are cheaper to read through than to skip.
    """
    spans: list[Span] = []
    order = sorted(range(len(extents)), key=lambda i: (extents[i].path, extents[i].offset, extents[i].nbytes))
    path, begin, end = "", 0, 0
    members: list[int] = []
    for index in order:
        extent = extents[index]
        if members and extent.path == path and extent.offset - end <= max_gap:
            end = max(end, extent.end)
            members.append(index)
            continue
        if members:
            spans.append(Span(Extent(path, begin, end - begin), tuple(members)))
        path, begin, end, members = extent.path, extent.offset, extent.end, [index]
    if members:
        spans.append(Span(Extent(path, begin, end - begin), tuple(members)))
    return spans
