"""Tensors put away on disk and brought back: written behind whoever computes, read ahead of them, through one ring.

    forward     | put 0 | put 1 | put 2 | ...        each is copied to blocks of the ring, which go once written
    backward    ... | take 2 | take 1 | take 0 |     blocks are read in the order announced, as the ring has room

The file has no name, so that nothing of it remains even if the process is killed.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import NewType

import torch

from offload.errors import BudgetError, StorageError
from offload.io.buffers import BufferPool, Lease
from offload.io.engine import Engine, File
from offload.io.extents import ALIGNMENT
from offload.tiers.host import as_tensor
from offload.tiers.swap import unlinked_file
from offload.units import MIB, format_bytes

BLOCK = 4 * MIB  # what the disk takes at its full rate
BLOCKS = 8  # of the ring: four under way and four being copied
GROWTH = 64 * MIB  # of the file
KEPT_ALIGNMENT = 64  # of addresses, which kernels may round by: torch's own allocations have it


Ticket = NewType("Ticket", int)  # what a tensor that was put away is taken back with


@dataclass(slots=True)
class _Kept:
    """A tensor that was put away: what it is, where its bytes are, and the writes that bring them there."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    at: int
    nbytes: int
    writes: list[Future[int]] = field(default_factory=list)
    arriving: deque[tuple[Lease, Future[int]]] = field(default_factory=deque)  # read ahead; bounded by the ring
    asked: int = 0  # blocks that were asked for


def can_put(tensor: torch.Tensor) -> bool:
    """Whether a tensor that comes back is the same to every kernel: what it shares with others would not be."""
    return (
        tensor.is_contiguous()
        and tensor.data_ptr() % KEPT_ALIGNMENT == 0
        and tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes() > 0
    )


class Stash:
    """Used by one thread at a time.

    Args:
        folder: on the disk to use.
        engine: moves the bytes.
        limit: bytes that the file may take; None: as many as there are.
    """

    def __init__(self, folder: Path, engine: Engine, limit: int | None = None) -> None:
        self._folder, self._engine, self._limit = folder, engine, limit
        self._file: File | None = None
        self._ring: BufferPool | None = None
        self._room = self._end = 0
        self._out: dict[Ticket, _Kept] = {}  # put away in this pass
        self._count = 0  # of tickets
        self._ahead: deque[_Kept] = deque()
        self.peak_nbytes = 0

    @property
    def ring_nbytes(self) -> int:
        return self._ring.buffer.nbytes if self._ring is not None else 0

    def put(self, tensor: torch.Tensor) -> Ticket:
        """Starts writing a tensor for which `can_put` holds; its memory is free when this returns.

        Raises:
            StorageError: the disk is full, or an earlier write failed.
            BudgetError: the file would take more than its limit.
        """
        data = tensor.detach().view(-1).view(torch.uint8)
        kept = _Kept(tuple(tensor.shape), tensor.dtype, self._end, data.numel())
        file, ring = self._take_room(self._end + _page(kept.nbytes))
        self._end += _page(kept.nbytes)
        ticket, self._count = Ticket(self._count), self._count + 1
        self._out[ticket] = kept
        for first in range(0, kept.nbytes, BLOCK):
            part = data[first : first + BLOCK]
            lease = ring.lease()
            as_tensor(lease.view)[: part.numel()].copy_(part)
            future = self._engine.write(file, kept.at + first, lease.view[: _page(part.numel())])
            future.add_done_callback(lambda _, lease=lease: lease.release())
            kept.writes.append(future)
        return ticket

    def expect(self, tickets: Sequence[Ticket]) -> None:
        """Starts reading ahead: tensors will be taken in this order."""
        self._ahead = deque(self._out[ticket] for ticket in tickets)
        self._read_ahead()

    def take(self, ticket: Ticket) -> torch.Tensor:
        """The tensor, in memory of its own.

        Raises:
            StorageError: it could not be written or read.
        """
        kept = self._out[ticket]
        tensor = torch.empty(kept.shape, dtype=kept.dtype)
        data = tensor.view(-1).view(torch.uint8)
        for first in range(0, kept.nbytes, BLOCK):
            if not kept.arriving:
                self._ask(kept, wait=True)
            part = data[first : first + BLOCK]
            lease, future = kept.arriving.popleft()
            try:
                future.result()
                part.copy_(as_tensor(lease.view)[: part.numel()])
            finally:
                lease.release()
            self._read_ahead()
        return tensor

    def clear(self) -> None:
        """Forgets everything, at the end of a pass; waits for what is under way."""
        self._ahead.clear()
        for kept in self._out.values():
            for future in kept.writes:
                future.exception()
            for lease, future in kept.arriving:
                future.exception()
                lease.release()
            kept.arriving.clear()
        self._out.clear()
        self.peak_nbytes = max(self.peak_nbytes, self._end)
        self._end = 0

    def close(self) -> None:
        """Gives memory and disk back."""
        self.clear()
        if self._file is not None and self._ring is not None:
            self._file.close()
            self._ring.close()
            self._file = None

    def _read_ahead(self) -> None:
        """Asks for blocks in the order announced, as far as the ring has room and their bytes are written."""
        while self._ahead:
            kept = self._ahead[0]
            if kept.asked * BLOCK >= kept.nbytes:
                self._ahead.popleft()
            elif not kept.writes[kept.asked].done() or not self._ask(kept, wait=False):
                return

    def _ask(self, kept: _Kept, *, wait: bool) -> bool:
        """Starts reading the next block of a tensor; False: there was no room for it, and nobody waited."""
        assert self._file is not None
        assert self._ring is not None
        lease = self._ring.try_lease()
        if lease is None:
            if not wait:
                return False
            lease = BufferPool(1, BLOCK).lease()  # others were announced before it: its own way past them
        first = kept.asked * BLOCK
        try:
            kept.writes[kept.asked].result()
            view = lease.view[: _page(min(BLOCK, kept.nbytes - first))]
            future = self._engine.read(self._file, kept.at + first, view)
        except BaseException:
            lease.release()
            raise
        kept.asked += 1
        kept.arriving.append((lease, future))
        return True

    def _take_room(self, nbytes: int) -> tuple[File, BufferPool]:
        """The file, with room for so many bytes, and the ring; both are made when they are first needed."""
        if self._file is None or self._ring is None:
            path, fd = unlinked_file(self._folder, 0)
            self._ring = BufferPool(BLOCKS, BLOCK)
            self._file = self._engine.open(path, writable=True, fd=fd)  # the descriptor is its own from here on
        if nbytes > self._room:
            room = -(-nbytes // GROWTH) * GROWTH
            if self._limit is not None and room > self._limit:
                raise BudgetError(
                    f"activations take {format_bytes(room)} on disk in this step, but {format_bytes(self._limit)} are "
                    "left of disk_limit. Raise disk_limit, take fewer tokens a step, or keep activations in memory"
                )
            fd, _ = self._file.descriptor()
            try:
                os.posix_fallocate(fd, self._room, room - self._room)
            except OSError as error:
                full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
                what = f"there is no room for {format_bytes(room)} of activations" if full else error.strerror
                raise StorageError(
                    f"{what}; free some space, or keep activations in memory",
                    path=str(self._folder), errno=error.errno,
                ) from error  # fmt: skip
            self._room = room
        return self._file, self._ring


def _page(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
