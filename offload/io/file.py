"""An open file: its buffered and its direct descriptor, which of them serves, and when they may be closed."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable

from offload.errors import ClosedError, StorageError, StrictError
from offload.io.backends.base import Files
from offload.io.extents import ALIGNMENT

_log = logging.getLogger("offload.io")
_REFUSALS = {errno.EINVAL, errno.EOPNOTSUPP, errno.EACCES, errno.EPERM}  # the last two: an adopted file of another user


class Fallbacks:
    """The lines that say which fast path was refused; an error instead of a line in strict mode. Safe for threads."""

    def __init__(self, *, is_strict: bool) -> None:
        self._is_strict = is_strict
        self._lines: dict[str, None] = {}  # an ordered set; one line a file, so bounded by the files
        self._lock = threading.Lock()

    def record(self, line: str) -> None:
        """Log a line once. Raises StrictError in strict mode, each time."""
        if self._is_strict:
            raise StrictError(f"{line}; strict mode forbids the fall-back to buffered I/O")
        with self._lock:
            is_new = line not in self._lines
            self._lines[line] = None
        if is_new:
            _log.warning("%s", line)

    def lines(self) -> tuple[str, ...]:
        """In the order they happened."""
        with self._lock:
            return tuple(self._lines)


class File:
    """A regular file opened by an engine, which makes it, lends it and closes it. It owns its descriptors.

    Every Engine.open() of the path lends this same object and is paired with one close(). The descriptors are closed
    when the last borrower has closed it and no request uses it any more.

    Attributes:
        path: as opened.
        nbytes: size in bytes when it was opened.
        identity: of the file behind the path.
        is_writable: opened for writing too.
        is_adopted: made from a descriptor that a caller brought.
        block_alignment: bytes that blocks of a request are cut at multiples of; does not change.
    """

    def __init__(
        self, files: Files, path: str, fallbacks: Fallbacks, on_closed: Callable[[File], None],
        *, is_writable: bool, wants_direct: bool, adopted: int | None,
    ) -> None:  # fmt: skip
        self.path, self.is_writable, self.is_adopted = path, is_writable, adopted is not None
        self._files, self._fallbacks, self._on_closed = files, fallbacks, on_closed
        self._lock = threading.Lock()
        self._borrowers, self._requests, self._is_closed = 1, 0, False
        self._direct: int | None = None
        self._serves_direct = False
        try:
            self._plain = files.open(path, is_writable=is_writable) if adopted is None else files.adopt(adopted)
        except OSError as error:
            raise StorageError(f"cannot open: {error.strerror}", path=path, errno=error.errno) from error
        try:
            status = files.status(self._plain)
            if not status.is_regular:
                raise StorageError("cannot open: it is not a regular file", path=path, errno=errno.EINVAL)
            self.nbytes, self.identity = status.nbytes, status.identity
            self._alignment = self._open_direct() if wants_direct else 1
            self.block_alignment = max(self._alignment, ALIGNMENT)
        except OSError as error:
            self._close_descriptors()
            if isinstance(error, StorageError):
                raise
            raise StorageError(f"cannot open: {error.strerror}", path=path, errno=error.errno) from error
        except StrictError:
            self._close_descriptors()
            raise

    @property
    def is_direct(self) -> bool:
        """Transfers bypass the page cache. Turns False for good when the file system refuses one."""
        return self._serves_direct

    @property
    def alignment(self) -> int:
        """What offset, length and address of a transfer must be multiples of, in bytes; 1 when buffered."""
        return self._alignment if self._serves_direct else 1

    def descriptor(self) -> tuple[int, bool]:
        """The descriptor that serves now, and whether it is direct."""
        if self._serves_direct and self._direct is not None:
            return self._direct, True
        return self._plain, False

    def fall_back(self, reason: str) -> None:
        """Serve buffered from now on. Raises StrictError in strict mode."""
        self._fallbacks.record(f"buffered I/O for {self.path}: {reason}")
        self._serves_direct = False

    def current_nbytes(self) -> int:
        """The size in bytes now. Raises OSError."""
        return self._files.status(self._plain).nbytes

    def sync(self) -> None:
        """Make what was written durable. Raises StorageError; a failed sync is not repeated."""
        with self._lock:
            if self._is_closed:
                raise ClosedError(f"{self.path} was closed")
            self._requests += 1  # holds the descriptors
        try:
            self._files.sync(self._plain)
        except OSError as error:
            raise StorageError(f"fsync failed: {error.strerror}", path=self.path, errno=error.errno) from error
        finally:
            self.end_request()

    def borrow(self) -> bool:
        """Lend the file once more; False when it is closed, is adopted, or has another size by now."""
        with self._lock:
            if self._is_closed or self.is_adopted or self.current_nbytes() != self.nbytes:
                return False
            self._borrowers += 1
            return True

    def close(self) -> None:
        """Take back one loan; after the last, new requests raise ClosedError and open ones run to their end."""
        self._end(borrowers=1)

    def close_all(self) -> None:
        """Take back every loan."""
        self._end(borrowers=self._borrowers)

    def begin_request(self) -> None:
        """Keep the descriptors open for a request. Raises ClosedError."""
        with self._lock:
            if self._is_closed:
                raise ClosedError(f"{self.path} was closed")
            self._requests += 1

    def end_request(self) -> None:
        """Undo begin_request(); closes the descriptors when that was the last thing to wait for."""
        with self._lock:
            self._requests -= 1
            is_last = self._is_closed and self._requests == 0
        if is_last:
            self._close_descriptors()

    def _end(self, borrowers: int) -> None:
        with self._lock:
            if self._is_closed:
                return
            self._borrowers -= borrowers
            self._is_closed = self._borrowers <= 0
            is_last = self._is_closed and self._requests == 0
            has_ended = self._is_closed
        if has_ended:
            self._on_closed(self)
        if is_last:
            self._close_descriptors()

    def _open_direct(self) -> int:
        alignment = self._files.alignment(self._plain)
        if alignment == 0:
            self.fall_back("the file system does not support direct I/O on it")
            return 1
        try:
            self._direct = self._files.open_direct(self._plain, self.path, is_writable=self.is_writable)
        except OSError as error:
            if error.errno not in _REFUSALS:
                raise
            self.fall_back(f"O_DIRECT was refused ({os.strerror(error.errno or 0)})")
            return 1
        self._serves_direct = True
        return alignment

    def _close_descriptors(self) -> None:
        for fd in (self._direct, self._plain):
            if fd is not None:
                self._files.close(fd)
        self._direct = None
