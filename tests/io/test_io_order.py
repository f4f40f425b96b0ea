"""Who is served when, and when memory is the caller's again: on the fake disk, one completion at a time."""

from __future__ import annotations

import errno
import gc
import random
import threading
import weakref
from concurrent.futures import CancelledError

import pytest
from io_worlds import PAGE, memory, pattern
from patience import HANGS_S

from offload.errors import ClosedError, StorageError
from offload.io.buffers import Buffer
from offload.io.requests import BESIDE


def test_any_order_of_completion_is_bit_exact(fake) -> None:
    """Blocks of many requests end in random order; each memory is poisoned the moment its future resolves."""
    contents = pattern(32 * PAGE)
    for seed in range(200):
        dice = random.Random(seed)
        engine, backend = fake(threads=dice.randint(1, 8))
        file = engine.open(backend.disk.put("file", contents))
        backend.hold()
        right = [0]

        def read(engine=engine, file=file, dice=dice, right=right) -> None:
            begin = dice.randrange(30)
            nbytes = dice.randint(1, min(6, 32 - begin)) * PAGE
            view = memory(nbytes)

            def check(_: object) -> None:
                right[0] += view == contents[begin * PAGE : begin * PAGE + nbytes]
                view[:] = b"\xff" * nbytes  # a late block would write over this

            engine.read(file, begin * PAGE, view, priority=dice.randrange(3)).add_done_callback(check)

        for _ in range(6):
            read()
            if backend.held and dice.random() < 0.5:
                backend.step(dice.randrange(len(backend.held)))
        backend.release(dice)
        assert right == [6]


def test_urgent_reads_first_and_equals_in_order(fake) -> None:
    engine, backend = fake(threads=1)
    file = engine.open(backend.disk.put("file", pattern(64 * PAGE)))
    backend.hold()
    requests = [(0, 5), (10, 1), (20, 1), (30, 0), (40, 5), (50, -3)]  # page, priority
    for page, priority in requests:
        engine.read(file, page * PAGE, memory(2 * PAGE), priority=priority)
    served = []
    while backend.held:
        served.append(backend.held[0].offset // PAGE)
        backend.step()
    # The first had one block with the disk already; its second waits for its priority like all others.
    assert served == [0, 50, 51, 30, 31, 10, 11, 20, 21, 1, 40, 41]


def test_the_first_of_two_reads_does_not_share_the_disk(fake) -> None:
    """Blocks of the second start beside it only where it leaves the disk too little, so that it ends as if alone."""
    block = BESIDE // 2
    engine, backend = fake(threads=8, block_nbytes=block)
    file = engine.open(backend.disk.put("file", bytes(8 * block)))
    backend.hold()
    first = engine.read(file, 0, memory(4 * block), priority=1)
    second = engine.read(file, 4 * block, memory(4 * block), priority=1)
    assert [held.offset // block for held in backend.held] == [0, 1, 2, 3]
    backend.step()
    backend.step()
    assert [held.offset // block for held in backend.held] == [2, 3], "two are enough for the disk"
    backend.step()
    assert [held.offset // block for held in backend.held] == [3, 4]
    engine.read(file, 0, memory(block), priority=0)
    assert [held.offset // block for held in backend.held] == [3, 4, 0], "what is more urgent need not wait"
    backend.step()
    assert first.done()
    assert [held.offset // block for held in backend.held] == [4, 0], "nor do the others, but they come behind it"
    backend.step(1)
    assert [held.offset // block for held in backend.held] == [4, 5, 6, 7]
    backend.release()
    assert second.result() == 4 * block


def test_writes_never_delay_reads(fake) -> None:
    engine, backend = fake(threads=4)
    file = engine.open(backend.disk.put("file", bytes(100 * PAGE)), writable=True)
    backend.hold()
    writes = [engine.write(file, i * 8 * PAGE, memory(8 * PAGE)) for i in range(10)]
    assert [block.is_write for block in backend.held] == [True, True], "half as many writes as reads"
    read = engine.read(file, 90 * PAGE, memory(4 * PAGE), priority=9)
    assert sum(not block.is_write for block in backend.held) == 4, "the read is with the disk at once"
    for index in (5, 4, 3, 2):
        backend.step(index)
    assert read.done()
    assert not any(future.done() for future in writes)
    assert engine.statistics().peak_in_flight == 6


def test_cancel_drops_what_is_not_started(fake) -> None:
    engine, backend = fake(threads=2)
    file = engine.open(backend.disk.put("file", pattern(32 * PAGE)))
    backend.hold()
    first, second, third = (engine.read(file, 0, memory(4 * PAGE)) for _ in range(3))
    assert engine.cancel(second)
    assert second.cancelled(), "nothing of it was started: its memory is free now"
    assert first.cancel()
    assert not first.done(), "two blocks are in flight"
    assert not engine.cancel(first), "there is nothing more to drop"
    backend.step()
    assert not first.done()
    backend.step()
    assert first.cancelled()
    with pytest.raises(CancelledError):
        first.result()
    backend.release()
    assert third.result() == 4 * PAGE
    assert engine.statistics().blocks == 2 + 4


def test_close_fails_what_is_queued(fake) -> None:
    engine, backend = fake(threads=2)
    file = engine.open(backend.disk.put("file", pattern(32 * PAGE)))
    futures = []
    backend.hold()
    for _ in range(3):
        futures.append(engine.read(file, 0, memory(2 * PAGE)))
    futures[0].add_done_callback(lambda _: None)
    backend._is_holding = False  # what is started from here on completes at once
    first, second = backend.held
    backend.step()
    backend.release()
    engine.close()
    assert all(future.done() for future in futures)
    assert {first.offset, second.offset} == {0, PAGE}
    with pytest.raises(ClosedError, match="closed"):
        engine.read(file, 0, memory(PAGE))


def test_close_while_blocks_are_queued(fake) -> None:
    engine, backend = fake(threads=1)
    file = engine.open(backend.disk.put("file", pattern(32 * PAGE)))
    backend.hold()
    running = engine.read(file, 0, memory(PAGE))
    partly = engine.read(file, 0, memory(3 * PAGE))
    failed = threading.Event()
    partly.add_done_callback(lambda _: failed.set())
    closing = threading.Thread(target=engine.close)
    closing.start()
    assert failed.wait(HANGS_S), "a queued request fails before close has waited for the running one"
    assert isinstance(partly.exception(), ClosedError)
    assert not running.done()
    backend.step()
    closing.join(HANGS_S)
    assert not closing.is_alive()
    assert running.result() == PAGE


def test_a_closed_file_stays_until_its_requests_end(fake) -> None:
    engine, backend = fake(threads=1)
    contents = pattern(4 * PAGE)
    file = engine.open(backend.disk.put("file", contents))
    backend.hold()
    view = memory(4 * PAGE)
    future = engine.read(file, 0, view)
    file.close()
    file.close()
    assert backend.disk.open_descriptors == 2
    with pytest.raises(ClosedError):
        engine.read(file, 0, memory(PAGE))
    backend.release()
    assert future.result() == 4 * PAGE
    assert view == contents
    assert backend.disk.open_descriptors == 0


def test_a_resolved_future_keeps_no_memory(fake) -> None:
    class Holder:
        pass

    engine, backend = fake(threads=1)
    file = engine.open(backend.disk.put("file", pattern(8 * PAGE)))
    backend.hold()
    engine.read(file, 0, memory(PAGE))
    buffer = Buffer(4 * PAGE)
    future = engine.read(file, 0, buffer.view, priority=100)
    dropped = weakref.ref(buffer._memory)
    engine.cancel(future)
    buffer.close()
    gc.collect()
    assert dropped() is None, "a cancelled request deep in the queue still holds its memory"
    assert future.cancelled()


def test_a_kept_error_keeps_no_memory(fake) -> None:
    engine, backend = fake()
    file = engine.open(backend.disk.put("file", pattern(2 * PAGE)))
    for need in (2 * PAGE, 4 * PAGE):  # fails with the disk's error, then for the end of the file
        if need == 2 * PAGE:
            backend.disk.fail(errno.EIO)
        buffer = Buffer(4 * PAGE)
        error = engine.read(file, 0, buffer.view, need=need).exception()
        assert isinstance(error, StorageError)
        dropped = weakref.ref(buffer._memory)
        buffer.close()
        gc.collect()
        assert dropped() is None, "the traceback of an error holds the caller's memory"


def test_busy_time_and_peak(fake) -> None:
    engine, backend = fake(threads=4)
    file = engine.open(backend.disk.put("file", pattern(8 * PAGE)))
    assert engine.statistics().busy_s == 0
    backend.hold()
    engine.read(file, 0, memory(8 * PAGE))
    running = engine.statistics()
    assert (running.in_flight, running.peak_in_flight, running.blocks) == (4, 4, 4)
    assert engine.statistics().busy_s >= running.busy_s
    backend.release()
    ended = engine.statistics()
    assert (ended.in_flight, ended.blocks, ended.read_bytes) == (0, 8, 8 * PAGE)
    assert engine.statistics().busy_s == ended.busy_s, "an idle engine is not busy"
