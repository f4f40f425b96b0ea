"""Reads single rows of a matrix that lives on disk, plain or packed, as an embedding needs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from offload.io.buffers import Buffer
from offload.io.engine import Engine, File
from offload.io.extents import Extent, coalesce
from offload.kernels.formats.form import Plane, Weight
from offload.tiers.futures import join
from offload.tiers.host import as_tensor
from offload.tiers.layout import Source

URGENT = -1  # priority of what a model waits for this instant
GAP = 16 << 10  # rows this close together are read as one


def read_rows(source: Source, rows: Sequence[int], engine: Engine, opened: Callable[[str], File]) -> torch.Tensor:
    """The rows of a two-dimensional tensor that is stored in one piece, in main memory.

    Args:
        rows: which, in ascending order.
        opened: gives the open file of a path.

    Raises:
        StorageError: they could not be read.
    """
    (piece,) = source.pieces
    nbytes = source.shape[1] * piece.dtype.itemsize
    found = _read([piece.extent.part(row * nbytes, nbytes) for row in rows], engine, opened)
    stored = torch.stack(found) if found else torch.empty(0, nbytes, dtype=torch.uint8)
    return stored.view(piece.dtype).to(source.dtype)


def read_packed_rows(source: Source, rows: Sequence[int], engine: Engine, opened: Callable[[str], File]) -> Weight:
    """The rows of a matrix that is stored packed, as a packed matrix of those rows. As `read_rows`."""
    form, run = source.form, source.pieces[0].extent
    assert form is not None
    planes = {p.field: p for p in form.planes()}
    by_row = [p for p in planes.values() if not p.field.startswith("patch_")]
    starts = planes.get("patch_start")
    wanted = [run.part(p.at + row * _row_nbytes(p), _row_nbytes(p)) for p in by_row for row in rows]
    if starts is not None:
        wanted += [run.part(starts.at + 4 * row, 8) for row in rows]
    found = iter(_read(wanted, engine, opened))
    arrays: dict[str, Any] = {}
    for plane in by_row:
        parts = [next(found) for _ in rows]
        arrays[plane.field] = torch.cat(parts).view(plane.dtype).view(len(rows), *plane.shape[1:])
    if starts is None:
        return form.matrix(arrays)
    ends = torch.stack(list(found)).view(torch.int32).tolist()
    for name in ("patch_input", "patch_exponent"):
        p = planes[name]
        size = p.dtype.itemsize
        parts = _read([run.part(p.at + a * size, (b - a) * size) for a, b in ends if b > a], engine, opened)
        arrays[name] = torch.cat([torch.empty(0, dtype=torch.uint8), *parts]).view(p.dtype)
    counts = torch.tensor([0, *(b - a for a, b in ends)], dtype=torch.int32)
    arrays["patch_start"] = counts.cumsum(0, dtype=torch.int32)
    return form.matrix(arrays)


def _row_nbytes(plane: Plane) -> int:
    return plane.nbytes // plane.shape[0]


def _read(extents: Sequence[Extent], engine: Engine, opened: Callable[[str], File]) -> list[torch.Tensor]:
    """The bytes of every extent, each in memory of its own; neighbours are read together."""
    spans = [(span, span.extent.aligned()) for span in coalesce(extents, max_gap=GAP)]
    buffer = Buffer(sum(whole.nbytes for _, whole in spans))
    area = as_tensor(buffer.view)
    futures, at = [], 0
    for span, whole in spans:
        view = buffer.view[at : at + whole.nbytes]
        need = span.extent.end - whole.offset
        futures.append(engine.read(opened(whole.path), whole.offset, view, need=need, priority=URGENT))
        at += whole.nbytes
    join(futures).result()
    found: dict[int, torch.Tensor] = {}
    at = 0
    for span, whole in spans:
        for k in span.members:
            begin = at + extents[k].offset - whole.offset
            found[k] = area[begin : begin + extents[k].nbytes].clone()
        at += whole.nbytes
    return [found[k] for k in range(len(extents))]
