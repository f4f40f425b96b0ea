"""Main memory: one huge-page region for everything that stays, handed out in page-aligned parts, and one to work in.

Huge pages matter three times: first touch is several times faster, O_DIRECT requests are not cut at 4 KiB pages, and
matrix-vector kernels read them faster.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from math import prod

import torch

from offload.io.buffers import Buffer
from offload.io.extents import ALIGNMENT


def as_tensor(view: memoryview) -> torch.Tensor:
    """The bytes of a buffer as a tensor (uint8) that shares them; the tensor keeps the memory alive."""
    if not view.nbytes:
        return torch.empty(0, dtype=torch.uint8)
    with warnings.catch_warnings():  # torch warns about read-only memory, which slots never are
        warnings.simplefilter("ignore")
        return torch.frombuffer(view, dtype=torch.uint8)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor (uint8, 1-D), on whatever device; memory is shared."""
    return tensor.reshape(-1).view(torch.uint8)


class HostArena:
    """A region of main memory that is handed out once, front to back, and freed as a whole."""

    def __init__(self, nbytes: int) -> None:
        self.buffer = Buffer(nbytes)
        self._used = 0
        self._is_closed = False

    def take(self, nbytes: int) -> memoryview:
        """The next `nbytes`, starting at a page boundary."""
        start = -(-self._used // ALIGNMENT) * ALIGNMENT
        assert start + nbytes <= self.buffer.nbytes, "the arena was sized by the same layouts that take from it"
        self._used = start + nbytes
        return self.buffer.view[start : self._used]

    @property
    def used_nbytes(self) -> int:
        return self._used

    def keep(self, tensors: Iterable[torch.Tensor]) -> bool:
        """Gives back all memory that none of these tensors lies in; returns whether any lies here at all."""
        if self._is_closed:
            return False
        starts = [(t.data_ptr() - self.buffer.address, t.numel() * t.itemsize) for t in tensors]
        spans = sorted((at, at + nbytes) for at, nbytes in starts if 0 <= at < self.buffer.nbytes)
        end = 0
        for begin, after in [*spans, (self.buffer.nbytes, 0)]:
            self.buffer.discard(end, max(end, begin))
            end = max(end, after)
        return bool(spans)

    def close(self) -> None:
        self._is_closed = True
        self.buffer.close()


class Scratch:
    """Memory for one tensor after another: as large as the largest so far, touched once, in huge pages."""

    def __init__(self) -> None:
        self._buffer = Buffer(0)

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of any content. The one before it must not be used any more."""
        nbytes = prod(shape) * dtype.itemsize
        if nbytes > self._buffer.nbytes:
            self._buffer.close()
            self._buffer = Buffer(nbytes)
        return as_tensor(self._buffer.view[:nbytes]).view(dtype).view(shape)

    def close(self) -> None:
        self._buffer.close()
