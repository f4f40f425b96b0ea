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
from offload.io.engine import Engine
from offload.io.extents import ALIGNMENT
from offload.tiers.durable import sync_folder
from offload.tiers.host import as_tensor
from offload.tiers.ring import Ring
from offload.units import MIB, format_bytes

CHUNK = 8 * MIB  # what is written at least, but for the end
AHEAD = 32 * MIB  # what may wait for the disk beside the longest room
_UNSUPPORTED = {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT}


class Sink:
    """A file that is appended to. A context manager: leaving it without `finish` leaves nothing.

    Args:
        path: what the file shall be called.
        engine: writes it.
        head_nbytes: bytes at its beginning that come last; a multiple of 4096.
        room_nbytes: what will be appended, about. It is taken from the disk at once: a full one is met before anything
            is written, and writes need not wait for each other, as those that make a file longer do.
        longest: bytes that `room` will be asked for at most.

    Raises:
        StorageError: the folder cannot be written to, or has no room.
    """

    def __init__(self, path: Path, engine: Engine, head_nbytes: int, room_nbytes: int, longest: int = 0) -> None:
        assert head_nbytes % ALIGNMENT == 0, head_nbytes
        self.path, self._engine, self._head = path, engine, head_nbytes
        self._partial = path.with_name(f".{path.name}.partial")
        self._has_name = False
        self._ring = Ring(max(longest + 2 * ALIGNMENT, CHUNK) + AHEAD)
        fd = self._create()
        try:
            self._take_room(fd, head_nbytes + -(-room_nbytes // ALIGNMENT) * ALIGNMENT)
            self._file = engine.open(path, writable=True, fd=fd)
        except BaseException:
            self._forget()
            raise
        self._pending: deque[Future[int]] = deque()  # one for each run of the ring, but for the current one
        self._run: torch.Tensor | None = None  # current; it begins with the file's byte `_flushed`
        self._filled = 0  # of the current run
        self._rest = torch.empty(0, dtype=torch.uint8)  # bytes after the last whole page, while there is no run
        self._flushed = head_nbytes  # of the file

    @property
    def nbytes(self) -> int:
        """What has been appended."""
        return self._flushed - self._head + self._filled + len(self._rest)

    def append(self, data: torch.Tensor) -> None:
        """Copies the bytes of a contiguous tensor to the end.

        Raises:
            StorageError: the disk is full, or failed.
        """
        for part in data.detach().reshape(-1).view(torch.uint8).split(CHUNK):
            self.room(len(part)).copy_(part)
            self.grow(len(part))

    def room(self, nbytes: int) -> torch.Tensor:
        """The next bytes of the file (uint8, of any content), to be filled in place and taken in with `grow`.

        Their address has the remainder of their place in the file, modulo a page.

        Raises:
            StorageError: the disk is full, or failed.
        """
        if self._run is None or self._filled + nbytes > len(self._run):
            self._flush()
            rest = self._rest
            self._run, self._filled = self._take(max(len(rest) + nbytes, CHUNK)), len(rest)
            self._run[: len(rest)], self._rest = rest, rest[:0]
        return self._run[self._filled : self._filled + nbytes]

    def grow(self, nbytes: int) -> None:
        """The file goes on behind the first `nbytes` of the last `room`."""
        self._filled += nbytes
        if self._filled >= CHUNK:
            self._flush()

    def finish(self, head: bytes) -> None:
        """Writes the beginning, makes everything durable and gives the file its name.

        Args:
            head: exactly `head_nbytes` bytes.
        """
        assert len(head) == self._head
        nbytes = self._head + self.nbytes
        self.room(-nbytes % ALIGNMENT).zero_()
        self.grow(-nbytes % ALIGNMENT)
        self._flush()
        while self._pending:
            self._land()
        for start in range(0, len(head), CHUNK):
            part = torch.frombuffer(bytearray(head[start : start + CHUNK]), dtype=torch.uint8)
            self._write(start, self._take(len(part)).copy_(part))
        while self._pending:
            self._land()
        fd, _ = self._file.descriptor()
        try:
            os.ftruncate(fd, nbytes)
            self._engine.fsync(self._file)
            if self._has_name:
                os.rename(self._partial, self.path)
            else:
                self._link(fd)
            self._has_name = False
            sync_folder(self.path.parent)
        except StorageError:
            raise
        except OSError as error:
            raise StorageError(f"{error.strerror}", path=str(self.path), errno=error.errno) from error

    def close(self) -> None:
        """Gives buffers and the descriptor back; an unfinished file is gone."""
        for future in self._pending:
            future.exception()  # memory may go only when nothing is written from it any more
        self._pending.clear()
        self._run = None
        self._ring.close()
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

    def _take_room(self, fd: int, nbytes: int) -> None:
        """Closes the descriptor where there is none."""
        try:
            os.posix_fallocate(fd, 0, nbytes)
        except OSError as error:
            os.close(fd)
            raise StorageError(
                f"no room for {format_bytes(nbytes)}: {error.strerror}", path=str(self.path), errno=error.errno
            ) from error

    def _flush(self) -> None:
        """Starts writing what the current run holds, but for what is behind the last whole page."""
        if self._run is None:
            return
        run, whole = self._run[: self._filled], self._filled // ALIGNMENT * ALIGNMENT
        self._run, self._filled, self._rest = None, 0, run[whole:].clone()
        self._write(self._flushed, run[:whole])
        self._flushed += whole

    def _write(self, offset: int, data: torch.Tensor) -> None:
        self._pending.append(self._engine.write(self._file, offset, memoryview(data.numpy())))

    def _take(self, nbytes: int) -> torch.Tensor:
        while (run := self._ring.take(nbytes)) is None:
            self._land()
        return as_tensor(run)

    def _land(self) -> None:
        self._pending.popleft().result()
        self._ring.give_back()
