"""Reads single rows of a matrix that lives on disk, as an embedding needs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from offload.io.buffers import Buffer
from offload.io.engine import Engine, File
from offload.io.extents import Extent, coalesce
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
    width = source.shape[1]
    nbytes = width * piece.dtype.itemsize
    extents = [Extent(piece.extent.path, piece.extent.offset + row * nbytes, nbytes) for row in rows]
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
    result = torch.empty((len(rows), width), dtype=source.dtype)
    at = 0
    for span, whole in spans:
        for k in span.members:
            begin = at + extents[k].offset - whole.offset
            raw = area[begin : begin + nbytes]
            result[k] = (raw.clone() if begin % piece.dtype.itemsize else raw).view(piece.dtype)
        at += whole.nbytes
    return result
