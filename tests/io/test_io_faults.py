"""What a disk can do wrong, in every order: on the fake disk, without a clock and without a thread."""

from __future__ import annotations

import errno
import gc
import logging
import random
import weakref
from concurrent.futures import CancelledError

import pytest
from io_worlds import PAGE, pattern

from offload.errors import ClosedError, StorageError, StrictError
from offload.io.buffers import Buffer


def memory(nbytes: int, fill: int = 0xEE) -> memoryview:
    view = Buffer(nbytes).view
    view[:] = bytes([fill]) * nbytes
    return view


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOMEM, errno.ESTALE])
def test_one_error_at_every_transfer(fake, number: int) -> None:
    """The k-th transfer fails once, k = 1, 2, … until none does: an error each time, and memory is free after it."""
    contents, k, fired = pattern(12 * PAGE), 0, True
    while fired:
        k += 1
        engine, backend = fake()
        file = engine.open(backend.disk.put("file", contents))
        backend.disk.fail(number, at=k, operation="read")
        view = memory(12 * PAGE)
        future = engine.read(file, 0, view)
        fired = future.exception() is not None
        if fired:
            error = future.exception()
            assert isinstance(error, StorageError)
            assert (error.errno, error.offset, error.path) == (number, (k - 1) * PAGE, file.path)
            assert "a read failed" in str(error)
        backend.disk.heal()
        assert engine.read(file, 0, view).result() == 12 * PAGE, "the engine goes on after an error"
        assert view == contents
        assert engine.statistics().errors == fired
    assert k == 13


def test_errors_that_last(fake) -> None:
    for k in range(1, 14):
        engine, backend = fake()
        file = engine.open(backend.disk.put("file", pattern(12 * PAGE)), writable=True)
        backend.disk.fail(errno.EIO, at=k, is_lasting=True)
        futures = [engine.write(file, 0, memory(6 * PAGE)), engine.read(file, 0, memory(6 * PAGE))]
        assert [future.exception() is None for future in futures] == [k > 6, k > 12]
        engine.check_integrity()


def test_a_failed_request_resolves_when_its_last_block_has_ended(fake) -> None:
    engine, backend = fake(threads=4)
    file = engine.open(backend.disk.put("file", pattern(12 * PAGE)))
    backend.hold()
    view = memory(12 * PAGE)
    future = engine.read(file, 0, view)
    assert len(backend.held) == 4
    backend.disk.fail(errno.EIO)
    backend.step(2)
    assert not future.done(), "three blocks may still write to the memory"
    assert len(backend.held) == 3, "no further block of a failed request is started"
    backend.step(1)
    backend.step(0)
    assert not future.done()
    backend.step()
    assert isinstance(future.exception(), StorageError)
    assert engine.statistics().blocks == 4


@pytest.mark.parametrize("number", [errno.EINTR, errno.EAGAIN])
def test_interruptions_are_continued_but_not_for_ever(fake, number: int) -> None:
    engine, backend = fake()
    contents = pattern(3 * PAGE)
    file = engine.open(backend.disk.put("file", contents))
    for k in (1, 2, 3):
        backend.disk.fail(number, at=k)
    view = memory(3 * PAGE)
    engine.read(file, 0, view).result()
    assert view == contents
    assert engine.statistics().retries == 3
    backend.disk.fail(number, is_lasting=True)
    with pytest.raises(StorageError) as caught:
        engine.read(file, 0, view).result()
    assert caught.value.errno == number
    assert engine.statistics().retries < 1000


@pytest.mark.parametrize("direct", [True, False])
def test_short_transfers_are_continued(fake, direct: bool) -> None:
    """Random short counts, many seeds: the bytes are exact both ways, also when a remainder is not aligned."""
    for seed in range(150):
        engine, backend = fake(direct=direct, block_nbytes=2 * PAGE)
        dice = random.Random(seed)
        contents = pattern(7 * PAGE + dice.randrange(PAGE), seed)
        file = engine.open(backend.disk.put("file", contents), writable=True)
        backend.disk.shorten(seed)
        view = memory(8 * PAGE)
        assert engine.read(file, 0, view, need=len(contents)).result() == len(contents)
        assert view[: len(contents)] == contents
        assert engine.statistics().read_bytes == len(contents)
        engine.write(file, PAGE, view[: 4 * PAGE]).result()
        assert backend.disk.get("file") == contents[:PAGE] + contents[: 4 * PAGE] + contents[5 * PAGE :]
        assert engine.fallbacks == ()


def test_transfers_without_progress_fail(fake, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, backend = fake()
    file = engine.open(backend.disk.put("file", pattern(PAGE)), writable=True)
    monkeypatch.setattr(backend.disk, "transfer", lambda block: 0)
    with pytest.raises(StorageError, match="no progress"):
        engine.write(file, 0, memory(PAGE)).result()


def test_a_bug_in_the_engine_fails_the_request(fake, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, backend = fake()
    file = engine.open(backend.disk.put("file", pattern(PAGE)))
    monkeypatch.setattr(backend.disk, "transfer", lambda block: "nonsense")
    with pytest.raises(StorageError, match="internal error"):
        engine.read(file, 0, memory(PAGE)).result()


@pytest.mark.parametrize("where", ["open", "transfer"])
def test_refused_direct_io_falls_back_once(fake, where: str, caplog: pytest.LogCaptureFixture) -> None:
    engine, backend = fake()
    contents = pattern(20 * PAGE)
    backend.disk.refuses_direct = where
    with caplog.at_level(logging.WARNING, "offload.io"):
        file = engine.open(backend.disk.put("file", contents), writable=True)
        assert file.is_direct == (where == "transfer")
        view = memory(20 * PAGE)
        engine.read(file, 0, view).result()
    assert view == contents
    assert not file.is_direct
    assert file.alignment == 1
    assert engine.write(file, 3, view[1:8]).result() == 7, "buffered now: nothing need be aligned"
    assert len(engine.fallbacks) == 1
    assert file.path in engine.fallbacks[0]
    assert "buffered" in engine.fallbacks[0]
    assert [record.getMessage() for record in caplog.records] == list(engine.fallbacks)
    engine.open(backend.disk.put("other", contents))
    assert len(engine.fallbacks) == (2 if where == "open" else 1)


def test_unsupported_by_statx(fake) -> None:
    engine, backend = fake()
    backend.disk.direct_alignment = 0
    file = engine.open(backend.disk.put("file", pattern(100)))
    assert not file.is_direct
    assert "does not support direct I/O" in engine.fallbacks[0]


def test_strict_mode_has_no_fall_backs(fake) -> None:
    engine, backend = fake(strict=True)
    path = backend.disk.put("file", pattern(4 * PAGE))
    backend.disk.refuses_direct = "open"
    with pytest.raises(StrictError, match="strict mode forbids"):
        engine.open(path)
    assert backend.disk.open_descriptors == 0
    backend.disk.refuses_direct = "transfer"
    file = engine.open(path)
    with pytest.raises(StrictError):
        engine.read(file, 0, memory(4 * PAGE)).result()
    assert engine.fallbacks == ()
    assert file.is_direct


@pytest.mark.parametrize("alignment", [512, 4096, 16384])
def test_every_alignment(fake, alignment: int) -> None:
    engine, backend = fake(block_nbytes=PAGE)
    backend.disk.direct_alignment = alignment
    contents = pattern(64 * 1024 + 77)
    file = engine.open(backend.disk.put("file", contents))
    assert file.alignment == alignment
    view = Buffer(4 << 20).view[: 5 * 16384]  # aligned to 2 MiB
    for seed in range(20):
        backend.disk.shorten(seed)
        assert engine.read(file, 0, view, need=len(contents)).result() == len(contents)
        assert view[: len(contents)] == contents
    assert engine.fallbacks == ()


def test_a_full_disk(fake) -> None:
    engine, backend = fake()
    file = engine.open(backend.disk.put("file", b""), writable=True)
    backend.disk.capacity = 3 * PAGE
    with pytest.raises(StorageError) as caught:
        engine.write(file, 0, memory(8 * PAGE)).result()
    assert caught.value.errno == errno.ENOSPC
    assert (caught.value.offset or 0) >= 3 * PAGE
    engine.write(file, 0, memory(3 * PAGE)).result()


def test_fsync_is_tried_once(fake) -> None:
    engine, backend = fake()
    file = engine.open(backend.disk.put("file", pattern(PAGE)), writable=True)
    backend.disk.fail(errno.EIO, operation="fsync", is_lasting=True)
    before = backend.disk.operations
    with pytest.raises(StorageError, match="fsync failed"):
        engine.fsync(file)
    assert backend.disk.operations == before + 1
    backend.disk.heal()
    engine.fsync(file)
    assert backend.disk.synced == [file.path]
    file.close()
    with pytest.raises(ClosedError):
        engine.fsync(file)


def test_open_errors_leak_nothing(fake) -> None:
    engine, backend = fake()
    path = backend.disk.put("file", pattern(PAGE))
    for number in (errno.EMFILE, errno.EACCES):
        backend.disk.fail(number, operation="open")
        with pytest.raises(StorageError, match="cannot open"):
            engine.open(path)
    assert backend.disk.open_descriptors == 0


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
    import threading

    engine, backend = fake(threads=1)
    file = engine.open(backend.disk.put("file", pattern(32 * PAGE)))
    backend.hold()
    running = engine.read(file, 0, memory(PAGE))
    partly = engine.read(file, 0, memory(3 * PAGE))
    failed = threading.Event()
    partly.add_done_callback(lambda _: failed.set())
    closing = threading.Thread(target=engine.close)
    closing.start()
    assert failed.wait(30), "a queued request fails before close has waited for the running one"
    assert isinstance(partly.exception(), ClosedError)
    assert not running.done()
    backend.step()
    closing.join(30)
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
