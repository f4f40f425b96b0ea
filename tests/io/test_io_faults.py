"""What a disk can do wrong, in every order: on the fake disk, without a clock and without a thread."""

from __future__ import annotations

import errno
import logging
import random

import pytest
from io_worlds import PAGE, memory, pattern

from offload.errors import ClosedError, StorageError, StrictError
from offload.io.buffers import Buffer


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
