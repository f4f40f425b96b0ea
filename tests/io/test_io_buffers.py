"""Buffers and the pool: alignment, ownership, and who gets the next slot."""

from __future__ import annotations

import random
import threading
import weakref
from collections.abc import Callable

import pytest
from patience import HANGS_S

from offload.errors import ClosedError, UsageError
from offload.io.addresses import address_of
from offload.io.buffers import HUGE_NBYTES, Buffer, BufferPool, Interrupted


@pytest.mark.parametrize("nbytes", [0, 1, 4096, 5000, HUGE_NBYTES - 1, HUGE_NBYTES, HUGE_NBYTES + 1, 3 * HUGE_NBYTES])
def test_buffers_are_aligned_zeroed_and_exact(nbytes: int) -> None:
    buffer = Buffer(nbytes)
    assert (len(buffer.view), buffer.nbytes) == (nbytes, nbytes)
    assert not buffer.view.readonly
    assert buffer.address % (HUGE_NBYTES if nbytes >= HUGE_NBYTES else 4096) == 0
    assert buffer.is_huge in ({True, False} if nbytes >= HUGE_NBYTES else {False})
    if nbytes:
        assert buffer.address == address_of(buffer.view)
        assert buffer.view[0] == buffer.view[-1] == 0
        buffer.view[0], buffer.view[-1] = 1, 2
        assert address_of(buffer.view[nbytes - 1 :]) == buffer.address + nbytes - 1
    buffer.close()
    buffer.close()
    with pytest.raises(ClosedError):
        _ = buffer.view


def test_negative_sizes() -> None:
    for make in (lambda: Buffer(-1), lambda: BufferPool(0, 1), lambda: BufferPool(1, -1)):
        with pytest.raises(UsageError):
            make()


def test_a_closed_buffer_lives_as_long_as_its_views() -> None:
    buffer = Buffer(8192)
    memory = weakref.ref(buffer._memory)
    part = buffer.view[4096:]
    part[0] = 7
    buffer.close()
    assert part[0] == 7
    del part
    assert memory() is None


def test_addresses_of_read_only_views() -> None:
    contents = b"0123456789"
    assert address_of(memoryview(contents)[3:]) == address_of(memoryview(contents)) + 3
    address_of(memoryview(b""))


def test_slots_do_not_overlap_and_are_rounded_up() -> None:
    pool = BufferPool(3, 5000)
    leases = [pool.lease() for _ in range(3)]
    assert [lease.index for lease in leases] == [0, 1, 2]
    assert {lease.nbytes for lease in leases} == {8192}
    assert [address_of(lease.view) for lease in leases] == [pool.buffer.address + i * 8192 for i in range(3)]
    assert pool.try_lease() is None
    leases[1].release()
    leases[0].release()
    with pool.lease() as lease:
        assert lease.index == 0, "the lowest free slot first"
    leases[2].release()
    found = pool.statistics()
    assert (found.slots, found.slot_nbytes, found.free, found.leased, found.peak_leased, found.leases) == (
        3, 8192, 3, 0, 3, 4,
    )  # fmt: skip
    pool.check_integrity()
    pool.close()


def test_a_second_release_is_a_bug() -> None:
    pool = BufferPool(2, 1)
    lease = pool.lease()
    lease.release()
    again = pool.lease()
    with pytest.raises(AssertionError, match="twice"):
        lease.release()
    assert pool.statistics().leased == 1, "the slot's next borrower keeps it"
    again.release()
    pool.check_integrity()


def test_timeouts() -> None:
    pool = BufferPool(1, 1)
    lease = pool.lease(timeout=0)
    for timeout in (0, 0.001):
        with pytest.raises(TimeoutError, match="all 1 are leased"):
            pool.lease(timeout=timeout)
    assert pool.statistics().waited_s > 0
    lease.release()
    pool.lease(timeout=0).release()


class Waiters:
    """Threads that wait in lease(), and what became of each."""

    def __init__(self, pool: BufferPool, count: int) -> None:
        self.pool, self.outcomes, self.ended = pool, [], threading.Semaphore(0)
        self.threads = []
        for number in range(count):
            thread = threading.Thread(target=self._wait, args=(number,))
            self.threads.append(thread)
            thread.start()
            _until(pool, lambda number=number: len(pool._waiting) == number + 1)

    def _wait(self, number: int) -> None:
        try:
            with self.pool.lease(30) as lease:
                self.outcomes.append((number, lease.index))
        except ClosedError as error:
            self.outcomes.append((number, type(error)))

    def join(self) -> None:
        for thread in self.threads:
            thread.join(HANGS_S)
            assert not thread.is_alive()


def _until(pool: BufferPool, condition: Callable[[], bool]) -> None:
    """Wait, without a clock, until another thread waits inside the pool."""
    tries = 0
    while not condition():
        tries += 1
        assert tries < 10_000_000
        with pool._changed:
            pass


def test_waiters_are_served_in_order() -> None:
    pool = BufferPool(1, 1)
    lease = pool.lease()
    waiters = Waiters(pool, 4)
    assert pool.try_lease() is None
    lease.release()
    waiters.join()
    assert waiters.outcomes == [(number, 0) for number in range(4)]
    pool.check_integrity()
    assert pool.statistics().leases == 5


@pytest.mark.parametrize(("action", "error"), [("interrupt", Interrupted), ("close", ClosedError)])
def test_waiters_are_woken(action: str, error: type[Exception]) -> None:
    pool = BufferPool(1, 1)
    lease = pool.lease()
    waiters = Waiters(pool, 3)
    getattr(pool, action)()
    waiters.join()
    assert {kind for _, kind in waiters.outcomes} == {error}
    for call in (pool.lease, pool.try_lease):
        with pytest.raises(error):
            call()
    lease.view[0] = 1  # still the borrower's
    lease.release()
    pool.check_integrity()
    assert issubclass(Interrupted, ClosedError)
    pool.close()


def test_an_interrupt_reaches_waiters_even_when_resumed_at_once() -> None:
    pool = BufferPool(1, 1)
    lease = pool.lease()
    waiters = Waiters(pool, 2)
    pool.interrupt()
    pool.resume()
    waiters.join()
    assert {kind for _, kind in waiters.outcomes} == {Interrupted}
    lease.release()
    pool.lease(0).release()


def test_many_threads_conserve_slots() -> None:
    pool = BufferPool(3, 4096)
    wrong: list[int] = []

    def work(number: int) -> None:
        dice = random.Random(number)
        for _ in range(200):
            with pool.lease(30) as lease:
                mark = bytes([number]) * 64
                lease.view[:64] = mark
                pool.check_integrity()
                if dice.random() < 0.2 and (other := pool.try_lease()) is not None:
                    other.release()
                if lease.view[:64] != mark:
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    found = pool.statistics()
    assert (found.free, found.leased) == (3, 0)
    assert found.leases >= 1200
    pool.close()
