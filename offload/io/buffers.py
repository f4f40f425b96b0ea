"""Page-aligned memory in huge pages, and a pool that lends equal slots of it.

Why huge pages: a request to a block device holds a few hundred segments, so a buffer of scattered 4 KiB pages cuts a
large read into small pieces and a disk reaches a third of its speed. Only *private* anonymous memory takes the advice.
"""

from __future__ import annotations

import mmap
import threading
import time
from collections import deque
from dataclasses import dataclass
from types import TracebackType

from offload.errors import ClosedError, UsageError
from offload.io.addresses import address_of
from offload.io.extents import ALIGNMENT

HUGE_NBYTES = 2 << 20


class Interrupted(ClosedError):
    """A pool was told to stop lending, so that whoever waits for a slot can wind down."""


class Buffer:
    """`nbytes` of zeroed private memory, page aligned; from 2 MiB on aligned to 2 MiB and advised to be huge pages.

    The buffer owns its memory. A last, partly used huge page may make up to 2 MiB more than `nbytes` resident.

    Attributes:
        nbytes: usable bytes; 0 is legal.
        address: of the first usable byte.
        is_huge: the kernel took the advice; it does not promise that every page is huge.
    """

    def __init__(self, nbytes: int) -> None:
        if nbytes < 0:
            raise UsageError(f"a buffer of {nbytes:,} bytes was asked for; the size must be at least 0")
        self.nbytes = nbytes
        self.is_huge = False
        slack = HUGE_NBYTES if nbytes >= HUGE_NBYTES else 0  # so that a 2 MiB boundary lies inside the mapping
        length = -(-max(nbytes, 1) // (slack or ALIGNMENT)) * (slack or ALIGNMENT) + slack
        self._memory: mmap.mmap | None = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        whole = memoryview(self._memory)
        self._skip = skip = -address_of(whole) % (slack or 1)
        self._view: memoryview | None = whole[skip : skip + nbytes]
        self.address = address_of(whole) + skip
        whole.release()
        if slack and hasattr(mmap, "MADV_HUGEPAGE"):
            try:
                self._memory.madvise(mmap.MADV_HUGEPAGE, skip, length - slack)
                self.is_huge = True
            except OSError:  # a kernel without transparent huge pages: is_huge says so
                self.is_huge = False

    @property
    def view(self) -> memoryview:
        """The writable bytes. Raises ClosedError after close()."""
        if self._view is None:
            raise ClosedError("the buffer was closed; its memory is no longer lent")
        return self._view

    def touch(self) -> None:
        """Make all of it resident now, as zeros where nothing was written, so that whoever measures memory sees it."""
        view = self.view
        for at in range(0, self.nbytes, ALIGNMENT):
            view[at] = view[at]

    def discard(self, begin: int, end: int) -> None:
        """Give back the whole pages of 4096 bytes between two bytes of it; they are zeros from now on."""
        view, memory = self.view, self._memory
        assert memory is not None
        assert 0 <= begin <= end <= view.nbytes, (begin, end, view.nbytes)
        first, last = -(-begin // ALIGNMENT) * ALIGNMENT, end // ALIGNMENT * ALIGNMENT
        if first < last:
            memory.madvise(mmap.MADV_DONTNEED, self._skip + first, last - first)

    def close(self) -> None:
        """Give the memory back, at once when nobody else holds a view of it, else with the last such view."""
        view, memory, self._view, self._memory = self._view, self._memory, None, None
        if view is None or memory is None:
            return
        try:
            view.release()
            memory.close()
        except BufferError:
            return  # views live on elsewhere: the mapping is theirs now and ends with the last of them


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """Slots and waits of a pool since it was made; `slot_nbytes` in bytes, `waited_s` summed over callers."""

    slots: int
    slot_nbytes: int
    free: int
    leased: int
    peak_leased: int
    leases: int
    waited_s: float


class Lease:
    """One slot, on loan until release(). A context manager.

    Attributes:
        view: the slot's bytes, still holding what the last borrower left.
        index: which slot, from 0.
        nbytes: len(view).
    """

    __slots__ = ("_is_live", "_pool", "index", "nbytes", "view")

    def __init__(self, pool: BufferPool, index: int, view: memoryview) -> None:
        self._pool, self.index, self.view, self.nbytes = pool, index, view, view.nbytes
        self._is_live = True

    def release(self) -> None:
        """Return the slot. The borrower must be done with every view of it; a second release is an AssertionError."""
        self._pool._give_back(self)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()


class BufferPool:
    """Equal slots cut from one buffer. The pool owns the memory, a lease owns its slot. Safe for threads.

    Waiters are served first come, first served, and get the free slot with the lowest index.

    Args:
        slots: how many, at least 1.
        slot_nbytes: bytes of each, rounded up to a multiple of 4096.
    """

    def __init__(self, slots: int, slot_nbytes: int) -> None:
        if slots < 1 or slot_nbytes < 0:
            raise UsageError(f"a pool of {slots} slots of {slot_nbytes:,} bytes was asked for; at least one is needed")
        self._slots, self._slot_nbytes = slots, -(-slot_nbytes // ALIGNMENT) * ALIGNMENT
        self._buffer = Buffer(self._slots * self._slot_nbytes)
        self._changed = threading.Condition()
        self._free = list(range(slots))
        self._leased: set[int] = set()
        self._waiting: deque[object] = deque()  # bounded by the number of threads that call lease()
        self._is_closed = self._is_interrupted = False
        self._interrupts = self._leases = self._peak = 0
        self._waited_s = 0.0

    @property
    def buffer(self) -> Buffer:
        """The memory of all slots; slot i starts at byte i * slot_nbytes."""
        return self._buffer

    def lease(self, timeout: float | None = None) -> Lease:
        """Wait for a slot.

        Args:
            timeout: seconds; None waits for ever.

        Raises:
            ClosedError: the pool is closed, or was closed during the wait.
            Interrupted: the pool is interrupted, or was interrupted during the wait.
            TimeoutError: no slot came free in time.
        """
        with self._changed:
            self._check_lends()
            if self._free and not self._waiting:
                return self._take()
            ticket, interrupts, began = object(), self._interrupts, time.monotonic()
            self._waiting.append(ticket)
            try:
                while not (self._free and self._waiting[0] is ticket):
                    left = None if timeout is None else timeout - (time.monotonic() - began)
                    if left is not None and left <= 0:
                        raise TimeoutError(f"no slot came free in {timeout:g} s; all {self._slots} are leased")
                    self._changed.wait(left)
                    self._check_lends()
                    if self._interrupts != interrupts:  # resumed before this thread woke: it was still interrupted
                        raise Interrupted("the wait for a slot was interrupted")
                return self._take()
            finally:
                self._waiting.remove(ticket)
                self._waited_s += time.monotonic() - began
                self._changed.notify_all()  # whoever is first now may find a slot free

    def try_lease(self) -> Lease | None:
        """A slot, or None when none is free or others wait already. Raises ClosedError or Interrupted as lease()."""
        with self._changed:
            self._check_lends()
            return self._take() if self._free and not self._waiting else None

    def interrupt(self) -> None:
        """Make every present waiter and every later lease() raise Interrupted until resume()."""
        with self._changed:
            self._is_interrupted, self._interrupts = True, self._interrupts + 1
            self._changed.notify_all()

    def resume(self) -> None:
        """Lend again after interrupt()."""
        with self._changed:
            self._is_interrupted = False

    def statistics(self) -> PoolStatistics:
        """A snapshot."""
        with self._changed:
            return PoolStatistics(
                self._slots, self._slot_nbytes, len(self._free), len(self._leased), self._peak, self._leases,
                self._waited_s,
            )  # fmt: skip

    def check_integrity(self) -> None:
        """Assert the conservation law: every slot is free or leased, never both, never neither."""
        with self._changed:
            assert len(self._free) + len(self._leased) == self._slots, (self._free, self._leased)
            assert set(self._free) | self._leased == set(range(self._slots)), (self._free, self._leased)

    def close(self) -> None:
        """Stop lending and give the memory back once no lease or view holds it. May be called twice."""
        with self._changed:
            self._is_closed = True
            self._buffer.close()
            self._changed.notify_all()

    def _check_lends(self) -> None:
        if self._is_closed:
            raise ClosedError("the buffer pool was closed")
        if self._is_interrupted:
            raise Interrupted("the buffer pool is interrupted")

    def _take(self) -> Lease:
        index = min(self._free)
        self._free.remove(index)
        self._leased.add(index)
        self._leases, self._peak = self._leases + 1, max(self._peak, len(self._leased))
        begin = index * self._slot_nbytes
        return Lease(self, index, self._buffer.view[begin : begin + self._slot_nbytes])

    def _give_back(self, lease: Lease) -> None:
        with self._changed:
            assert lease._is_live, f"the lease of slot {lease.index} was released twice"
            lease._is_live = False
            self._leased.remove(lease.index)
            self._free.append(lease.index)
            self._changed.notify_all()
