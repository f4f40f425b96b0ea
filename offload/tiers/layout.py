"""How the tensors of one bundle lie in files and in the memory they are read into.

A tensor that the checkpoint stores as the model wants it is *plain*: its bytes are read where they will be used, as the
aligned superset that O_DIRECT asks for, and the tensor is a view into it. It keeps its position modulo the page, so its
alignment is that of a memory-mapped file: fp32 matrix-vector kernels round differently at other alignments, and plain
transformers computes on mapped files.

A tensor that must be assembled (experts that are stored one by one, another dtype) is read to a staging area and copied
from there, piece by piece, to an address aligned to 64 bytes, as a fresh allocation would be.

    one slot:  | plain extents, page aligned | assembled tensors | staging |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch

from offload.io.extents import ALIGNMENT, Extent, coalesce
from offload.kernels.formats.form import Form
from offload.tiers.slots import VIEW_ALIGNMENT, round_up, slot_nbytes

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
    def slot_nbytes(self) -> int:
        """Bytes of a slot this tensor needs at most."""
        return slot_nbytes(self.nbytes, (p.extent.nbytes for p in self.pieces), is_plain=self.is_plain)


@dataclass(frozen=True, slots=True)
class ReadOp:
    """One aligned range to read: `nbytes` from `offset` of a file to `at`; `need` of them must arrive."""

    path: str
    offset: int
    nbytes: int
    need: int
    at: int
    is_staging: bool


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

    @property
    def nbytes(self) -> int:
        return self.final_nbytes + self.staging_nbytes

    @property
    def read_nbytes(self) -> int:
        return sum(r.nbytes for r in self.reads)


def lay_out(sources: Sequence[Source]) -> Layout:
    """Places the tensors of one bundle: plain ones where their extents fall, assembled ones behind them."""
    plain = [s for s in sources if s.is_plain]
    assembled = [s for s in sources if not s.is_plain]
    views: dict[str, View] = {}
    reads: list[ReadOp] = []
    copies: list[CopyOp] = []
    end = _add_reads(reads, [s.pieces[0].extent for s in plain], 0, False, places := {})
    for k, source in enumerate(plain):
        views[source.name] = view_of(source, places[k])
    for source in assembled:
        end = round_up(end, VIEW_ALIGNMENT)
        views[source.name] = view_of(source, end)
        end += source.nbytes
    final_nbytes = round_up(end, ALIGNMENT)
    pieces = [(s, p) for s in assembled for p in s.pieces]
    staging_nbytes = _add_reads(reads, [p.extent for _, p in pieces], 0, True, places := {})
    for k, (source, piece) in enumerate(pieces):
        to = views[source.name].at + piece.start * source.dtype.itemsize
        copies.append(CopyOp(places[k], piece.dtype, piece.count, to, source.dtype))
    return Layout(final_nbytes, staging_nbytes, tuple(reads), tuple(copies), views)


def _add_reads(
    reads: list[ReadOp], extents: Sequence[Extent], end: int, is_staging: bool, places: dict[int, int]
) -> int:
    """Appends the aligned reads that cover `extents` from `end` on; fills `places` with where each one begins."""
    for span in coalesce(extents, max_gap=MAX_GAP):
        whole = span.extent.aligned(ALIGNMENT)
        reads.append(ReadOp(whole.path, whole.offset, whole.nbytes, span.extent.end - whole.offset, end, is_staging))
        for k in span.members:
            places[k] = end + extents[k].offset - whole.offset
        end += whole.nbytes
    return end


def assemble(layout: Layout, final: torch.Tensor, staging: torch.Tensor) -> None:
    """Copies the staged pieces of a bundle to their places. Both areas are bytes (uint8)."""
    for op in layout.copies:
        nbytes = op.count * op.dtype.itemsize
        source = staging[op.at : op.at + nbytes]
        target = final[op.to : op.to + op.count * op.to_dtype.itemsize].view(op.to_dtype)
        if op.at % op.dtype.itemsize:  # an odd header length: the bytes cannot be viewed where they lie
            source = source.clone()
        target.copy_(source.view(op.dtype))
