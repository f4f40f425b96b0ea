"""The heap that libraries take their memory from while they work: grown beforehand, resident and in huge pages.

glibc maps large blocks anew and gives them back until it has learnt better, and it takes small pages. So a first prompt
meets tens of thousands of page faults. A reserve is a range at the heap's end that is there before:

    heap    | small things; holes are plugged | reserve: resident, huge pages | more of both | mapped: what does not fit

While there is one, all threads that have no heap of their own yet allocate from this one, and nothing of it goes back
to the system. Large blocks that find no place in it are mapped, and unmapped when they are freed. Settings are the
process's, so `close` undoes them as far as glibc can.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any

from offload.io.buffers import HUGE_NBYTES
from offload.units import KIB, MIB

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8  # names in malloc.h begin with M_
_NEVER = -1
_MOST_MAPPED = 65536  # blocks: glibc's default
_MAPPED_FROM = MIB  # while there is a reserve, what does not fit
_MAPPED_LATER, _TRIMMED_LATER = 32 * MIB, 64 * MIB  # which glibc comes to by itself, where it may move them
_PLUGS = 32 * MIB, 64 * KIB  # the largest and the smallest
_LENT = 64 * MIB, 4 * MIB  # likewise
_FROM_END = 128 * MIB  # glibc keeps less behind the last block
_ALL = sys.maxsize

_lock = threading.Lock()
_reserves = 0  # that are open


class Reserve:
    """`nbytes` at the end of the heap for what is allocated from now on, resident as soon as this returns.

    Make it in the thread that will allocate. Those that are open at once share what is free. A context manager.

    Attributes:
        nbytes: what is reserved; 0 where it could not be, or nothing was asked for.
        reason: why it could not be, a sentence; None where it was.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes, self.reason = 0, None if nbytes <= 0 else "the heap was not reserved: malloc is not glibc's"
        self._begin = 0
        self._plugs: list[tuple[int, int]] = []
        self._is_open = False
        self._libc: Any = _libc()
        if self._libc is not None and nbytes > 0:
            self._open(-(-nbytes // HUGE_NBYTES) * HUGE_NBYTES)

    def _open(self, nbytes: int) -> None:
        global _reserves
        libc, length = self._libc, nbytes + HUGE_NBYTES  # so that whole huge pages lie inside
        share_heap()
        with _lock:
            _reserves += 1
            self._is_open = True
            libc.mallopt(_TRIM_THRESHOLD, _NEVER)
            libc.mallopt(_MMAP_MAX, 0)  # the reserve shall lie in the heap
            block = libc.malloc(length)
            while block is not None and libc.sbrk(0) - block > length + _FROM_END:
                self._plugs.append((block, length))
                block = libc.malloc(length)
            is_at_end = block is not None and block < libc.sbrk(0)
            libc.mallopt(_MMAP_THRESHOLD, _PLUGS[1])
            libc.mallopt(_MMAP_MAX, _MOST_MAPPED)  # plugs that find no hole shall not
            if is_at_end and _reserves == 1:
                self._plugs += self._found(*_PLUGS, 0, libc.sbrk(0))
            libc.mallopt(_MMAP_THRESHOLD, _MAPPED_FROM)
        if is_at_end:
            self._begin, self.nbytes, self.reason = block, nbytes, None
            self._fill(_up(block), nbytes)
        libc.free(block)  # it is what the next large block is taken from
        if not is_at_end:
            self.close()
            self.reason = "the heap was not reserved: this thread has one of its own, or malloc is not glibc's"

    def _found(self, largest: int, smallest: int, start: int, end: int, most: int = _ALL) -> list[tuple[int, int]]:
        """(address, bytes) of free blocks between two addresses, the largest first, of `most` bytes in all.

        Elsewhere they would be used before the reserve: many small pages, most of which are not resident. A block that
        is not written to costs nothing.
        """
        blocks: list[tuple[int, int]] = []
        others: list[int] = []  # in the heap, but not there: until the end, or they would be found again
        size = min(largest, most)
        while size >= smallest:
            block = self._libc.malloc(size)
            if block is not None and start <= block < end:
                blocks.append((block, size))
                most -= size
                size = min(size, most)
            elif block is not None and block < self._libc.sbrk(0):
                others.append(block)
            else:  # mapped: no hole is so large
                self._libc.free(block)
                size //= 2
        for block in others:
            self._libc.free(block)
        return blocks

    def _fill(self, start: int, nbytes: int) -> None:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._libc.madvise(start, nbytes, mmap.MADV_HUGEPAGE)  # a kernel without them gives small ones
        ctypes.memset(start, 0, nbytes)

    @contextmanager
    def lent(self, nbytes: int) -> Iterator[None]:
        """The system has so much of it meanwhile, as far as it is free, for other memory that is needed for a while."""
        most = min(nbytes, self.nbytes)
        blocks = self._found(*_LENT, self._begin, self._begin + self.nbytes, most) if most else []
        inside = [(_up(at), (at + size - _up(at)) // HUGE_NBYTES * HUGE_NBYTES) for at, size in blocks]
        try:
            for start, length in inside:
                self._libc.madvise(start, length, mmap.MADV_DONTNEED)
            yield
        finally:
            for start, length in inside:
                self._fill(start, length)
            for block, _ in blocks:
                self._libc.free(block)

    def __enter__(self) -> Reserve:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """With the last reserve, free memory goes back to the system, and the allocator may do so by itself again."""
        global _reserves
        if not self._is_open:
            return
        self._is_open = False
        for block, _ in self._plugs:
            self._libc.free(block)
        self._plugs.clear()
        with _lock:
            _reserves -= 1
            if not _reserves:
                self._libc.mallopt(_MMAP_THRESHOLD, _MAPPED_LATER)
                self._libc.mallopt(_TRIM_THRESHOLD, _TRIMMED_LATER)
                trim()
        self.nbytes = 0


def share_heap() -> None:
    """Makes every thread allocate from one heap, as far as it has none of its own yet.

    glibc gives each thread a heap, and each keeps tens of MiB that its thread freed. Micro-batches have a thread each,
    of which one runs at once: eight of them would hold eight times what one needs.
    """
    libc = _libc()
    if libc is not None:
        libc.mallopt(_ARENA_MAX, 1)


def trim() -> None:
    """Gives freed memory back to the system, wherever it lies."""
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(0)


def _up(address: int) -> int:
    return -(-address // HUGE_NBYTES) * HUGE_NBYTES


def _libc() -> Any:
    """The C library of this process, if it is glibc."""
    libc = ctypes.CDLL(None)
    with suppress(AttributeError):  # another library lacks one of them
        libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
        libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
        libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        libc.mallopt.argtypes, libc.malloc_trim.argtypes = [ctypes.c_int, ctypes.c_int], [ctypes.c_size_t]
        return libc
    return None
