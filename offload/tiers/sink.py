"""Writes one long file front to back, at the disk's speed, and gives it its name only when it is complete.

The file has no name while it grows (O_TMPFILE), so that neither an exit nor a kill leaves a byte behind; where the file
system cannot do that, it has a name that says it is partial and is removed on the way out.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from concurrent.futures import Future
from pathlib import Path

import torch

from offload.errors import StorageError
from offload.io.buffers import BufferPool, Lease
from offload.io.engine import Engine
from offload.io.extents import ALIGNMENT
from offload.tiers.host import as_tensor
from offload.units import MIB, format_bytes

CHUNK = 8 * MIB
BUFFERS = 4
_UNSUPPORTED = {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT}


class Sink:
    """A file that is appended to. A context manager: leaving it without `finish` leaves nothing.

    Args:
        path: what the file shall be called.
        engine: writes it.
        head_nbytes: bytes at its beginning that come last; a multiple of 4096.
        room_nbytes: what will be appended, about. The room is taken at once: a full disk is met before anything is
            written, and writes need not wait for each other, as those that make a file longer do.

    Raises:
        StorageError: the folder cannot be written to, or has no room.
    """

    def __init__(self, path: Path, engine: Engine, head_nbytes: int, room_nbytes: int) -> None:
        assert head_nbytes % ALIGNMENT == 0, head_nbytes
        self.path, self._engine, self._head = path, engine, head_nbytes
        self._partial = path.with_name(f".{path.name}.partial")
        self._has_name = False
        fd = self._create()
        try:
            os.posix_fallocate(fd, 0, head_nbytes + -(-room_nbytes // ALIGNMENT) * ALIGNMENT)
        except OSError as error:
            os.close(fd)
            self._forget()
            raise StorageError(
                f"no room for {format_bytes(room_nbytes)}: {error.strerror}", path=str(path), errno=error.errno
            ) from error
        self._file = engine.open(path, writable=True, fd=fd)
        self._pool = BufferPool(BUFFERS, CHUNK)
        self._pending: deque[tuple[Lease, Future[int]]] = deque()
        self._lease: Lease | None = None
        self._filled = 0  # of the current buffer
        self._flushed = head_nbytes  # of the file

    @property
    def nbytes(self) -> int:
        """What has been appended."""
        return self._flushed - self._head + self._filled

    def append(self, data: torch.Tensor) -> None:
        """Copies the bytes of a contiguous tensor to the end.

        Raises:
            StorageError: the disk is full, or failed.
        """
        data = data.detach().reshape(-1).view(torch.uint8)
        at = 0
        while at < len(data):
            if self._lease is None:
                if len(self._pending) == BUFFERS:
                    self._land()
                self._lease = self._pool.lease()
            count = min(CHUNK - self._filled, len(data) - at)
            as_tensor(self._lease.view)[self._filled : self._filled + count] = data[at : at + count]
            self._filled += count
            at += count
            if self._filled == CHUNK:
                self._flush(CHUNK)

    def finish(self, head: bytes) -> None:
        """Writes the beginning, makes everything durable and gives the file its name.

        Args:
            head: exactly `head_nbytes` bytes.
        """
        assert len(head) == self._head
        nbytes = self._head + self.nbytes
        if self._filled:
            self._flush(-(-self._filled // ALIGNMENT) * ALIGNMENT)
        while self._pending:
            self._land()
        for start in range(0, len(head), CHUNK):
            lease, part = self._pool.lease(), head[start : start + CHUNK]
            lease.view[: len(part)] = part
            self._pending.append((lease, self._engine.write(self._file, start, lease.view[: len(part)])))
            self._land()
        fd, _ = self._file.descriptor()
        try:
            os.ftruncate(fd, nbytes)
            self._engine.fsync(self._file)
            if self._has_name:
                os.rename(self._partial, self.path)
            else:
                self._link(fd)
        except OSError as error:
            raise StorageError(f"{error.strerror}", path=str(self.path), errno=error.errno) from error
        self._has_name = False

    def close(self) -> None:
        """Gives buffers and the descriptor back; an unfinished file is gone."""
        for lease, future in self._pending:
            future.exception()  # a buffer may go only when nothing is written from it any more
            lease.release()
        self._pending.clear()
        if self._lease is not None:
            self._lease.release()
            self._lease = None
        self._pool.close()
        self._file.close()
        self._forget()

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def _forget(self) -> None:
        """Removes the partial file, if it has a name."""
        if self._has_name:
            self._partial.unlink(missing_ok=True)

    def _link(self, fd: int) -> None:
        """Gives the open file its name. To follow the link in /proc takes linkat(), hence the folder's descriptor."""
        folder = os.open("/proc/self/fd", os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.link(str(fd), self.path, src_dir_fd=folder, follow_symlinks=True)
        finally:
            os.close(folder)

    def _create(self) -> int:
        flags = os.O_RDWR | os.O_CLOEXEC
        try:
            try:
                return os.open(self.path.parent, flags | os.O_TMPFILE, 0o644)
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
            self._partial.unlink(missing_ok=True)
            self._has_name = True
            return os.open(self._partial, flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise StorageError(
                f"a file cannot be made here: {error.strerror}", path=str(self.path.parent), errno=error.errno
            ) from error

    def _flush(self, nbytes: int) -> None:
        """Starts writing the current buffer."""
        assert self._lease is not None
        lease, self._lease = self._lease, None
        self._pending.append((lease, self._engine.write(self._file, self._flushed, lease.view[:nbytes])))
        self._flushed += self._filled
        self._filled = 0

    def _land(self) -> None:
        lease, future = self._pending[0]
        future.result()
        self._pending.popleft()
        lease.release()
