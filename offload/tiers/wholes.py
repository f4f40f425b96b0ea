"""Brings whole tensors from disk, one after another: each is used where it was read while later ones come."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from math import prod

import torch

from offload.io.engine import Engine
from offload.tiers.host import Scratch, as_tensor
from offload.tiers.layout import Source
from offload.tiers.open_files import OpenFiles
from offload.tiers.ring import Ring
from offload.units import MIB

AHEAD = 160 * MIB  # what is read beside the largest tensor: so much that the disk is busy while one is used

Reads = list[tuple[memoryview, Future[int]]]
"""A tensor's pieces, in order: where each is read to, as the aligned extent."""


def bring_wholes(
    jobs: Sequence[tuple[Source, Callable[[torch.Tensor], None]]],
    engine: Engine,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Reads every tensor and hands it on, in order: in the model's dtype, to be used until the function returns.

    Args:
        progress: called with bytes as they arrive.

    Raises:
        StorageError: something could not be read. Nothing is in flight then.
    """
    if not jobs:
        return
    ring, scratch = Ring(max(_run_nbytes(source) for source, _ in jobs) + AHEAD), Scratch()
    waiting, flights = deque(source for source, _ in jobs), deque[Reads]()
    files = OpenFiles(engine)
    try:
        for source, use in jobs:
            while waiting and (run := ring.take(_run_nbytes(waiting[0]))) is not None:
                flights.append([])
                _read(waiting.popleft(), run, engine, files, flights[-1])
            for _, future in flights[0]:
                nbytes = future.result()
                if progress is not None:
                    progress(nbytes)
            use(_tensor(source, flights[0], scratch))
            flights.popleft()
            ring.give_back()
    finally:
        for reads in flights:
            for _, future in reads:
                future.exception()
        flights.clear()
        files.__exit__()
        scratch.close()
        ring.close()


def _run_nbytes(source: Source) -> int:
    return sum(piece.extent.aligned().nbytes for piece in source.pieces)


def _read(source: Source, run: memoryview, engine: Engine, files: OpenFiles, reads: Reads) -> None:
    """Starts to read every piece to its part of `run`."""
    for piece in source.pieces:
        whole = piece.extent.aligned()
        part, run = run[: whole.nbytes], run[whole.nbytes :]
        need = piece.extent.end - whole.offset
        reads.append((part, engine.read(files[whole.path], whole.offset, part, need=need)))


def _tensor(source: Source, reads: Reads, scratch: Scratch) -> torch.Tensor:
    """The tensor where it was read or, where it must be put together or cast, in `scratch`."""
    parts = []
    for piece, (view, _) in zip(source.pieces, reads, strict=True):
        begin = piece.extent.offset - piece.extent.aligned().offset
        parts.append(as_tensor(view)[begin : begin + piece.extent.nbytes])
    if source.is_plain:
        return parts[0].view(source.dtype).view(source.shape)
    whole = scratch.tensor((prod(source.shape),), source.element)
    for piece, raw in zip(source.pieces, parts, strict=True):
        is_aligned = piece.extent.offset % piece.dtype.itemsize == 0
        whole[piece.start : piece.start + piece.count] = (raw if is_aligned else raw.clone()).view(piece.dtype)
    return whole.view(source.shape)
