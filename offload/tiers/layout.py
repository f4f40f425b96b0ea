"""How the tensors of one bundle lie in files and in the memory they are read into.

A tensor that the checkpoint stores as the model wants it is *plain*: its bytes are read where they will be used, as the
aligned superset that O_DIRECT asks for, and the tensor is a view into it. It keeps its position modulo the page, so its
alignment is that of a memory-mapped file: fp32 matrix-vector kernels round differently at other alignments, and plain
transformers computes on mapped files.

A tensor that must be assembled (experts that are stored one by one, another dtype) is placed behind them. Large pieces
that are stored as they are used are read straight to their places in it, as `slots.py` says: one transfer goes through
whole pages of the tensor and, between them, pages of a staging area, from which the ends of pieces are copied. All
others are read to that area whole and copied from there, to an address aligned to 64 bytes, as a fresh allocation is.

    one slot:  | plain extents, page aligned | assembled tensors | staging |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch

from offload.io.extents import ALIGNMENT, Extent, coalesce
from offload.kernels.formats.form import Form
from offload.tiers.slots import VIEW_ALIGNMENT, Run, Way, round_up, slot_nbytes, way_of
from offload.tiers.staging import Edge, ReadOp, Target, stage

MAX_GAP = ALIGNMENT  # reading through a hole this small is cheaper than another request


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of consecutive elements of a tensor, stored somewhere.

    Attributes:
        extent: where it lies.
        dtype: how it is stored.
        start: index of its first element in the tensor, counted in row-major order.
        count: number of elements.
    """

    extent: Extent
    dtype: torch.dtype
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor of the model and the stored pieces it is made of, which cover it exactly.

    Attributes:
        name: the parameter's.
        dtype, shape: as the model sees it.
        pieces: what to read.
        form: None, or how the matrix is packed in memory, as one run of bytes.
        is_stored_packed: whether the pieces are that run; else it is made of them while the model is loaded.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    form: Form | None = None
    is_stored_packed: bool = False

    @property
    def nbytes(self) -> int:
        """In memory."""
        return self.form.nbytes if self.form else prod(self.shape) * self.dtype.itemsize

    @property
    def element(self) -> torch.dtype:
        """What its pieces are handed on as: the model's dtype, or the bytes of a packed run."""
        return torch.uint8 if self.is_stored_packed else self.dtype

    @property
    def is_made(self) -> bool:
        """Whether it is packed while the model is loaded."""
        return self.form is not None and not self.is_stored_packed

    @property
    def unpacked(self) -> Source:
        """The same as it is stored: for a tensor that streams."""
        return replace(self, form=None) if self.is_made else self

    @property
    def is_plain(self) -> bool:
        """Whether a view into the bytes of the file is the tensor."""
        if self.form is not None:
            return self.is_stored_packed
        return (
            len(self.pieces) == 1
            and self.pieces[0].dtype == self.dtype
            and self.pieces[0].extent.offset % self.dtype.itemsize == 0
        )

    @property
    def read_nbytes(self) -> int:
        return sum(p.extent.nbytes for p in self.pieces)

    @property
    def way(self) -> Way | None:
        """How it comes to a slot; None where it is plain."""
        if self.is_plain:
            return None
        size = self.element.itemsize
        as_stored = self.form is None and all(p.dtype == self.dtype for p in self.pieces)
        return way_of((Run(p.extent, p.start * size) for p in self.pieces), size, as_stored=as_stored)

    @property
    def slot_nbytes(self) -> int:
        """Bytes of a slot this tensor needs at most."""
        return slot_nbytes(self.nbytes, self.way)

    @property
    def staged_nbytes(self) -> int:
        """Bytes that are read beside its place in a slot and copied there."""
        way = self.way
        return way.staged_nbytes if way is not None else 0


@dataclass(frozen=True, slots=True)
class CopyOp:
    """One piece to copy from the staging area, cast if the dtypes differ."""

    at: int
    dtype: torch.dtype
    count: int
    to: int
    to_dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class View:
    """Where a tensor lies in the final area."""

    at: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def of(self, area: torch.Tensor) -> torch.Tensor:
        """The tensor, as a view of an area of bytes (uint8)."""
        return area[self.at : self.at + self.nbytes].view(self.dtype).view(self.shape)


def view_of(source: Source, at: int) -> View:
    """Where a tensor lies that begins at `at`: itself, or the run of bytes of its packed form."""
    if source.form is not None:
        return View(at, torch.uint8, (source.form.nbytes,))
    return View(at, source.dtype, source.shape)


@dataclass(frozen=True, slots=True)
class Layout:
    """A bundle: what to read, what to copy, where each tensor ends up.

    Attributes:
        final_nbytes: size of the area that the views point into.
        staging_nbytes: size of the area that is needed only while the bundle arrives.
    """

    final_nbytes: int
    staging_nbytes: int
    reads: tuple[ReadOp, ...]
    copies: tuple[CopyOp, ...]
    views: Mapping[str, View]
    edges: tuple[Edge, ...] = ()

    @property
    def nbytes(self) -> int:
        return self.final_nbytes + self.staging_nbytes

    @property
    def read_nbytes(self) -> int:
        return sum(r.nbytes for r in self.reads)


def lay_out(sources: Sequence[Source]) -> Layout:
    """Places the tensors of one bundle: plain ones where their extents fall, assembled ones behind them."""
    plain = [s for s in sources if s.is_plain]
    assembled = [(s, way) for s in sources if (way := s.way) is not None]
    views: dict[str, View] = {}
    reads: list[ReadOp] = []
    end = _add_plain(reads, [s.pieces[0].extent for s in plain], places := {})
    for k, source in enumerate(plain):
        views[source.name] = view_of(source, places[k])
    for source, way in assembled:
        end = round_up(end, VIEW_ALIGNMENT) if way.shift is None else end + (way.shift - end) % ALIGNMENT
        views[source.name] = view_of(source, end)
        end += source.nbytes
    runs = [
        (run, views[s.name].at + run.at if way.is_direct(run) else None) for s, way in assembled for run in way.runs
    ]
    staging = stage(runs, MAX_GAP)
    copies = []
    for source, way in assembled:
        for piece in _copied(source, way):
            to = views[source.name].at + piece.start * source.element.itemsize
            copies.append(CopyOp(staging.place_of(piece.extent), piece.dtype, piece.count, to, source.dtype))
    return Layout(
        final_nbytes=round_up(end, ALIGNMENT),
        staging_nbytes=staging.nbytes,
        reads=(*reads, *staging.reads),
        copies=tuple(copies),
        views=views,
        edges=tuple(staging.edges),
    )


def _add_plain(reads: list[ReadOp], extents: Sequence[Extent], places: dict[int, int]) -> int:
    """Appends the aligned reads that cover `extents`; fills `places` with where each one begins. Returns the end."""
    end = 0
    for span in coalesce(extents, max_gap=MAX_GAP):
        whole = span.extent.aligned(ALIGNMENT)
        target = Target(end, whole.nbytes, False)
        reads.append(ReadOp(whole.path, whole.offset, span.extent.end - whole.offset, (target,), True))
        for k in span.members:
            places[k] = end + extents[k].offset - whole.offset
        end += whole.nbytes
    return end


def _copied(source: Source, way: Way) -> Iterator[Piece]:
    """Pieces that are not read to their places."""
    for piece, k in zip(source.pieces, way.members, strict=True):
        if not way.is_direct(way.runs[k]):
            yield piece


def assemble(layout: Layout, final: torch.Tensor, staging: torch.Tensor) -> None:
    """Copies the staged pieces of a bundle to their places. Both areas are bytes (uint8)."""
    for op in layout.copies:
        nbytes = op.count * op.dtype.itemsize
        source = staging[op.at : op.at + nbytes]
        target = final[op.to : op.to + op.count * op.to_dtype.itemsize].view(op.to_dtype)
        if op.at % op.dtype.itemsize:  # an odd header length: the bytes cannot be viewed where they lie
            source = source.clone()
        target.copy_(source.view(op.dtype))
