"""Reads that go through tensors and, where those want no bytes or not yet, through memory beside them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from offload.io.extents import ALIGNMENT, Extent
from offload.tiers.slots import Run, round_up


class Target(NamedTuple):
    """Whole pages of memory, in the final area or in the staging area."""

    at: int
    nbytes: int
    is_staging: bool


@dataclass(frozen=True, slots=True)
class ReadOp:
    """One aligned range to read from `offset` of a file on, to one target after the other; `need` bytes must arrive.

    Attributes:
        is_plain: of tensors that are views into it.
    """

    path: str
    offset: int
    need: int
    targets: tuple[Target, ...]
    is_plain: bool

    @property
    def nbytes(self) -> int:
        return sum(target.nbytes for target in self.targets)


class Edge(NamedTuple):
    """Bytes less than a page to copy from the staging area: an end of a piece that is read to its place."""

    at: int
    to: int
    nbytes: int


class Staging:
    """Bytes that are read beside their places.

    Attributes:
        nbytes: of the staging area.
        reads: what is read, to its place or to that area.
        edges: what is copied from there at once: ends of runs whose pages are read to their places.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self.reads: list[ReadOp] = []
        self.edges: list[Edge] = []
        self._held: dict[str, list[tuple[int, int, int]]] = {}  # path -> (offset, bytes, where in the staging area)

    def place_of(self, extent: Extent) -> int:
        """Where in the staging area the bytes of an extent begin."""
        for offset, nbytes, at in reversed(self._held[extent.path]):
            if offset <= extent.offset and extent.end <= offset + nbytes:
                return at + extent.offset - offset
        raise AssertionError(f"{extent} is not read beside its place")

    def add(self, runs: list[tuple[Run, int | None]]) -> None:
        """One read of runs that lie one after the other in a file; as `stage`."""
        first, last = runs[0][0].extent, runs[-1][0].extent
        begin = cursor = first.offset // ALIGNMENT * ALIGNMENT
        targets: list[Target] = []
        for run, place in runs:
            extent, pages = run.extent, run.pages
            if place is None:
                cursor = self._hold(targets, extent.path, cursor, round_up(extent.end, ALIGNMENT))
                continue
            head = pages.offset - extent.offset
            self._hold(targets, extent.path, cursor, pages.offset)
            targets.append(Target(place + head, pages.nbytes, False))
            cursor = self._hold(targets, extent.path, pages.end, round_up(extent.end, ALIGNMENT))
            tail = extent.end - pages.end
            if head:
                self.edges.append(Edge(self.place_of(extent.part(0, head)), place, head))
            if tail:
                at = extent.nbytes - tail
                self.edges.append(Edge(self.place_of(extent.part(at, tail)), place + at, tail))
        self.reads.append(ReadOp(first.path, begin, last.end - begin, tuple(targets), False))

    def _hold(self, targets: list[Target], path: str, begin: int, end: int) -> int:
        """Reads whole pages of a file to the staging area; returns how far the file has been read."""
        if end <= begin:
            return begin
        held = self._held.setdefault(path, [])
        if targets and targets[-1].is_staging:
            before, (offset, nbytes, at) = targets.pop(), held.pop()
            targets.append(before._replace(nbytes=before.nbytes + end - begin))
            held.append((offset, nbytes + end - begin, at))
        else:
            targets.append(Target(self.nbytes, end - begin, True))
            held.append((begin, end - begin, self.nbytes))
        self.nbytes += end - begin
        return end


def stage(runs: Iterable[tuple[Run, int | None]], max_gap: int) -> Staging:
    """Plans the reads of runs, neighbours in a file together.

    Args:
        runs: each with where in the final area it begins, if its whole pages are read to their places.
        max_gap: bytes between two runs that are cheaper to read through than to skip.
    """
    staging, together = Staging(), list[tuple[Run, int | None]]()
    for found in sorted(runs, key=lambda found: (found[0].extent.path, found[0].extent.offset)):
        extent = found[0].extent
        if together and not _follows(together[-1][0].extent, extent, max_gap):
            staging.add(together)
            together = []
        together.append(found)
    if together:
        staging.add(together)
    return staging


def _follows(last: Extent, extent: Extent, max_gap: int) -> bool:
    return last.path == extent.path and 0 <= extent.offset - last.end <= max_gap
