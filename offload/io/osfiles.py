"""Files of the operating system: opening without waiting, a second direct descriptor, alignment from statx."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import stat
import struct
from functools import cache

from offload.io.backends.base import FileStatus
from offload.io.extents import ALIGNMENT

_AT_EMPTY_PATH = 0x1000
_STATX_DIOALIGN = 0x2000
_DIOALIGN_OFFSET = 152  # in struct statx: two 32-bit numbers, for memory and for file offsets
_MAX_ALIGNMENT = 1 << 20


class OsFiles:
    """The Files of backends that talk to the operating system."""

    def open(self, path: str, *, is_writable: bool) -> int:
        """A buffered descriptor. O_NONBLOCK, only during open, keeps a named pipe from blocking it."""
        flags = (os.O_RDWR if is_writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        fd = os.open(path, flags)
        try:
            return self.adopt(fd)
        except OSError:
            os.close(fd)
            raise

    def adopt(self, fd: int) -> int:
        """Clear O_DIRECT and O_NONBLOCK, set close-on-exec. The number stays the same."""
        os.set_inheritable(fd, False)
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~(os.O_NONBLOCK | getattr(os, "O_DIRECT", 0)))
        return fd

    def open_direct(self, fd: int, path: str, *, is_writable: bool) -> int:
        """Reopen what `fd` refers to with O_DIRECT; works for unlinked files."""
        if not hasattr(os, "O_DIRECT"):
            raise OSError(errno.EINVAL, "this system has no O_DIRECT")
        return self.reopen(fd, path, (os.O_RDWR if is_writable else os.O_RDONLY) | os.O_DIRECT)

    def reopen(self, fd: int, path: str, flags: int) -> int:
        """A descriptor of its own, with its own position, of the file behind `fd`; EINVAL where that cannot be had."""
        try:
            return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)
        except FileNotFoundError:
            pass  # no /proc: take the path, if it still leads to the same file
        again = -1
        with contextlib.suppress(FileNotFoundError):
            again = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
        if again >= 0 and self.status(again).identity == self.status(fd).identity:
            fcntl.fcntl(again, fcntl.F_SETFL, fcntl.fcntl(again, fcntl.F_GETFL) & ~os.O_NONBLOCK)
            return again
        if again >= 0:
            os.close(again)
        raise OSError(errno.EINVAL, "the file cannot be reopened: there is no /proc and its path leads elsewhere")

    def alignment(self, fd: int) -> int:
        """From statx where kernel and file system tell (0: no direct I/O), else 4096."""
        statx = _statx()
        if statx is None:
            return ALIGNMENT
        found = ctypes.create_string_buffer(256)
        if statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, found) != 0:
            return ALIGNMENT
        if not struct.unpack_from("=I", found, 0)[0] & _STATX_DIOALIGN:
            return ALIGNMENT
        of_memory, of_offset = struct.unpack_from("=II", found, _DIOALIGN_OFFSET)
        if of_offset == 0:
            return 0
        alignment = max(int(of_memory), int(of_offset))
        return alignment if alignment & (alignment - 1) == 0 and alignment <= _MAX_ALIGNMENT else ALIGNMENT

    def status(self, fd: int) -> FileStatus:
        """From fstat."""
        found = os.fstat(fd)
        return FileStatus(found.st_size, stat.S_ISREG(found.st_mode), (found.st_dev, found.st_ino))

    def identity(self, path: str) -> tuple[int, int] | None:
        """Device and inode."""
        try:
            found = os.stat(path)
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def sync(self, fd: int) -> None:
        """fsync, once: after a failed one the kernel may call lost pages clean, so it is never tried again."""
        os.fsync(fd)

    def close(self, fd: int) -> None:
        """close()."""
        os.close(fd)


@cache
def _statx() -> ctypes._NamedFuncPointer | None:
    """The C library's statx, or None where it has none."""
    try:
        function = ctypes.CDLL(None, use_errno=True).statx
    except (AttributeError, OSError):
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_char_p)
    function.restype = ctypes.c_int
    return function
