"""Brings tensors from disk to where they stay by way of a few small buffers: to cast, to assemble, or to upload."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from math import prod

import torch

from offload.io.buffers import BufferPool, Lease
from offload.io.engine import Engine
from offload.io.extents import ALIGNMENT, Extent
from offload.tiers.host import Scratch, as_tensor
from offload.tiers.layout import Piece, Source
from offload.tiers.open_files import OpenFiles
from offload.units import MIB

CHUNK = 16 * MIB
BUFFERS = 4

Put = Callable[[int, torch.Tensor], None]
"""Called with the index of the first element and the elements, in the model's dtype and row-major order."""


def chunks(source: Source) -> Iterator[Piece]:
    """The pieces of a tensor, none larger than CHUNK."""
    for piece in source.pieces:
        itemsize = piece.dtype.itemsize
        step = CHUNK // itemsize
        for first in range(0, piece.count, step):
            count = min(step, piece.count - first)
            extent = Extent(piece.extent.path, piece.extent.offset + first * itemsize, count * itemsize)
            yield Piece(extent, piece.dtype, piece.start + first, count)


def gather(source: Source, scratch: Scratch, put: Callable[[torch.Tensor], None]) -> Put:
    """A receiver that collects a tensor's elements in `scratch` and hands the tensor on when they are all there."""
    whole: torch.Tensor | None = None
    missing = prod(source.shape)

    def receive(start: int, values: torch.Tensor) -> None:
        nonlocal whole, missing
        if whole is None:
            whole = scratch.tensor(source.shape, source.dtype)
        whole.view(-1)[start : start + len(values)] = values
        missing -= len(values)
        if not missing:
            full, whole = whole, None
            put(full)

    return receive


def copy_to(target: torch.Tensor) -> Put:
    """A receiver that copies elements to where a contiguous tensor has them."""
    flat = target.view(-1)

    def put(start: int, values: torch.Tensor) -> None:
        flat[start : start + len(values)] = values

    return put


def bring(
    jobs: Sequence[tuple[Source, Put]], engine: Engine, pool: BufferPool, progress: Callable[[int], None] | None = None
) -> None:
    """Reads every tensor and hands its elements to its `put`, in order, while later ones are being read.

    Args:
        pool: from `buffers`.
        progress: called with bytes as they arrive.

    Raises:
        StorageError: something could not be read. Nothing is in flight then.
    """
    flights: deque[tuple[Lease, Future[int], Source, Piece, Put]] = deque()

    def land() -> None:
        lease, future, source, piece, put = flights.popleft()
        nbytes = future.result()
        begin = piece.extent.offset - piece.extent.aligned().offset
        raw = as_tensor(lease.view)[begin : begin + piece.extent.nbytes]
        stored = (raw.clone() if begin % piece.dtype.itemsize else raw).view(piece.dtype)
        put(piece.start, stored.to(source.element))
        lease.release()
        if progress is not None:
            progress(nbytes)

    with OpenFiles(engine) as files:
        try:
            for source, put in jobs:
                for piece in chunks(source):
                    if len(flights) == BUFFERS:
                        land()
                    lease, whole = pool.lease(), piece.extent.aligned()
                    need = piece.extent.end - whole.offset
                    future = engine.read(files[whole.path], whole.offset, lease.view[: whole.nbytes], need=need)
                    flights.append((lease, future, source, piece, put))
            while flights:
                land()
        finally:
            for _, future, *_ in flights:
                future.exception()


def bring_into(tensors: Mapping[str, torch.Tensor], sources: Mapping[str, Source], engine: Engine) -> None:
    """Reads tensors to where they shall be, by name."""
    pool = buffers()
    try:
        bring([(sources[name], copy_to(tensor)) for name, tensor in tensors.items()], engine, pool)
    finally:
        pool.close()


def buffers() -> BufferPool:
    """The buffers that `bring` needs."""
    return BufferPool(BUFFERS, CHUNK + 2 * ALIGNMENT)


def is_same(a: Source, b: Source, engine: Engine) -> bool:
    """Whether two stored tensors hold the same values. Reads both."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    differs = False
    mine: deque[tuple[int, torch.Tensor]] = deque()

    def keep(start: int, values: torch.Tensor) -> None:
        mine.append((start, values.clone()))

    def compare(start: int, values: torch.Tensor) -> None:
        nonlocal differs
        first, expected = mine.popleft()
        differs = differs or first != start or not torch.equal(expected, values)

    for piece_a, piece_b in zip(chunks(a), chunks(b), strict=True):
        pool = buffers()
        one = [(Source(s.name, s.dtype, s.shape, (p,)), f) for s, p, f in ((a, piece_a, keep), (b, piece_b, compare))]
        bring(one, engine, pool)
        pool.close()
        if differs:
            return False
    return True
