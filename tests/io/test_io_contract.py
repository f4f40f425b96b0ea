"""What every backend promises through the engine. A backend listed in BACKENDS is tested here the day it appears."""

from __future__ import annotations

import errno
import os
import random
import threading
from concurrent.futures import wait

import pytest
from io_worlds import PAGE, World, pattern
from patience import HANGS_S

from offload.errors import ClosedError, StorageError, UsageError
from offload.io.backends import BACKENDS, create, probe
from offload.io.engine import Engine


@pytest.mark.parametrize("block_nbytes", [PAGE, 3 * PAGE, 1 << 20])
@pytest.mark.parametrize("direct", [True, False])
def test_reads_equal_the_file_however_it_is_cut(world: World, block_nbytes: int, direct: bool) -> None:
    contents = pattern(40 * PAGE)
    engine = world.engine(block_nbytes=block_nbytes, direct=direct)
    file = engine.open(world.put(engine, contents))
    view, dice = world.buffer(40 * PAGE), random.Random(7)
    for _ in range(8):
        begin = dice.randrange(40)
        nbytes = dice.randint(1, 40 - begin) * PAGE
        at = dice.randint(0, 40 - nbytes // PAGE) * PAGE
        view[:] = b"\xee" * len(view)
        assert engine.read(file, begin * PAGE, view[at : at + nbytes]).result() == nbytes
        assert view[at : at + nbytes] == contents[begin * PAGE : begin * PAGE + nbytes]
        assert set(view[:at]) | set(view[at + nbytes :]) <= {0xEE}, "bytes outside of the view were touched"
    assert engine.statistics().read_requests == 8


def test_buffered_reads_need_no_alignment(world: World) -> None:
    contents, dice = pattern(5 * PAGE + 123), random.Random(1)
    engine = world.engine(direct=False, block_nbytes=PAGE)
    file = engine.open(world.put(engine, contents))
    assert (file.is_direct, file.alignment, engine.fallbacks) == (False, 1, ())
    for _ in range(50):
        begin = dice.randrange(len(contents))
        memory = bytearray(dice.randint(1, len(contents) - begin))
        assert engine.read(file, begin, memoryview(memory)).result() == len(memory)
        assert memory == contents[begin : begin + len(memory)]


@pytest.mark.parametrize("tail", [1, 511, 512, 513, PAGE - 1, PAGE])
def test_an_aligned_superset_may_pass_the_end(world: World, tail: int) -> None:
    contents = pattern(3 * PAGE + tail)
    engine = world.engine(block_nbytes=PAGE)
    file = engine.open(world.put(engine, contents))
    view = world.buffer(8 * PAGE)
    for need in (len(contents), len(contents) - 1, 0):
        view[:] = bytes(len(view))
        assert engine.read(file, 0, view, need=need).result() == len(contents)
        assert view[: len(contents)] == contents


def test_a_file_that_ends_too_early_is_an_error(world: World) -> None:
    engine = world.engine(block_nbytes=PAGE)
    path = world.put(engine, pattern(2 * PAGE + 100))
    file = engine.open(path)
    with pytest.raises(StorageError, match=r"the file ends at byte 8,292 .* up to byte 8,293") as caught:
        engine.read(file, 0, world.buffer(4 * PAGE), need=2 * PAGE + 101).result()
    assert caught.value.path == path
    assert caught.value.offset == 2 * PAGE + 100
    with pytest.raises(StorageError, match="the file ends"):
        engine.read(file, 8 * PAGE, world.buffer(PAGE), need=1).result()
    assert engine.statistics().errors == 2


def test_truncated_while_open(world: World) -> None:
    engine = world.engine(block_nbytes=PAGE)
    path = world.put(engine, pattern(16 * PAGE))
    file = engine.open(path)
    world.truncate(engine, path, 5 * PAGE + 17)
    view = world.buffer(16 * PAGE)
    with pytest.raises(StorageError, match="the file ends at byte") as caught:
        engine.read(file, 0, view).result()
    assert (caught.value.offset or 0) >= 5 * PAGE + 17
    assert engine.read(file, 0, view, need=5 * PAGE + 17).result() == 5 * PAGE + 17


def test_vanished_while_open(world: World) -> None:
    engine = world.engine()
    contents = pattern(4 * PAGE)
    path = world.put(engine, contents)
    file = engine.open(path)
    world.remove(engine, path)
    view = world.buffer(4 * PAGE)
    engine.read(file, 0, view).result()
    assert view == contents
    with pytest.raises(StorageError, match="cannot open"):
        engine.open(path)


def test_writes_arrive_and_survive_fsync(world: World) -> None:
    engine = world.engine(block_nbytes=2 * PAGE)
    path = world.put(engine, bytes(20 * PAGE))
    file = engine.open(path, writable=True)
    contents = pattern(20 * PAGE, seed=3)
    view = world.buffer(20 * PAGE)
    view[:] = contents
    futures = [engine.write(file, i * 5 * PAGE, view[i * 5 * PAGE : (i + 1) * 5 * PAGE]) for i in range(4)]
    assert [future.result() for future in futures] == [5 * PAGE] * 4
    engine.fsync(file)
    assert world.get(engine, path) == contents
    back = world.buffer(20 * PAGE)
    engine.read(file, 0, back).result()
    assert back == contents
    found = engine.statistics()
    assert (found.write_bytes, found.write_requests, found.read_bytes) == (20 * PAGE, 4, 20 * PAGE)


def test_writes_extend_a_file_from_read_only_memory(world: World) -> None:
    engine = world.engine(direct=False)
    path = world.put(engine, b"")
    file = engine.open(path, writable=True)
    assert engine.write(file, 0, memoryview(b"head")).result() == 4
    assert engine.write(file, 6, memoryview(b"tail")).result() == 4
    assert world.get(engine, path) == b"head\0\0tail"


def test_one_file_per_path_and_a_new_one_for_a_new_file(world: World) -> None:
    engine = world.engine()
    path = world.put(engine, pattern(PAGE))
    first = engine.open(path)
    assert engine.open(path) is first
    writable = engine.open(path, writable=True)
    assert writable is not first
    first.close()  # one of two loans
    view = world.buffer(PAGE)
    engine.read(first, 0, view).result()
    first.close()
    with pytest.raises(ClosedError):
        engine.read(first, 0, view)
    newer = pattern(PAGE, seed=9)
    world.put(engine, newer)  # another file at the same path
    file = engine.open(path, writable=True)
    assert file is not writable
    engine.read(file, 0, view).result()
    assert view == newer


def test_a_file_that_grew_is_opened_anew(world: World) -> None:
    engine = world.engine(direct=False)
    file = engine.open(world.put(engine, b"1234"), writable=True)
    engine.write(file, 4, memoryview(b"56")).result()
    again = engine.open(file.path)
    assert (file.nbytes, again.nbytes) == (4, 6)
    assert engine.open(file.path) is again


def test_only_regular_files(world: World, tmp_path: os.PathLike[str]) -> None:
    engine = world.engine()
    with pytest.raises(StorageError, match="cannot open") as caught:
        engine.open(os.path.join(tmp_path, "missing"))
    assert caught.value.errno == errno.ENOENT
    if not world.is_fake:
        pipe = os.path.join(tmp_path, "pipe")
        os.mkfifo(pipe)
        for path in (pipe, tmp_path):
            with pytest.raises(StorageError, match="not a regular file"):
                engine.open(path)


def test_an_adopted_unlinked_file(world: World, tmp_path: os.PathLike[str]) -> None:
    engine = world.engine(block_nbytes=PAGE)
    path = world.put(engine, bytes(4 * PAGE), "swap")
    fd = engine.backend.files.open(path, is_writable=True) if world.is_fake else os.open(path, os.O_RDWR)
    world.remove(engine, path)
    file = engine.open(path, writable=True, fd=fd)
    view, back = world.buffer(4 * PAGE), world.buffer(4 * PAGE)
    view[:] = pattern(4 * PAGE)
    engine.write(file, 0, view).result()
    engine.read(file, 0, back).result()
    assert back == view
    other = world.put(engine, pattern(PAGE), "swap")
    assert engine.open(other) is not file, "an adopted file is not what its path leads to"
    file.close()


def test_misaligned_direct_requests_are_bugs(world: World) -> None:
    engine = world.engine()
    file = engine.open(world.put(engine, pattern(4 * PAGE)))
    if not file.is_direct:
        pytest.skip("the file system of tmp_path refuses direct I/O")
    view = world.buffer(4 * PAGE)
    for offset, part in ((1, view[:PAGE]), (0, view[1 : PAGE + 1]), (0, view[: PAGE - 1])):
        with pytest.raises(AssertionError, match="multiples of"):
            engine.read(file, offset, part)
    for need in (-1, PAGE + 1):
        with pytest.raises(AssertionError):
            engine.read(file, 0, view[:PAGE], need=need)
    with pytest.raises(AssertionError, match="reading only"):
        engine.write(file, 0, view)
    with pytest.raises(AssertionError, match="writable"):
        engine.read(file, 0, view.toreadonly())


def test_nothing_to_transfer(world: World) -> None:
    engine = world.engine()
    file = engine.open(world.put(engine, b""), writable=True)
    assert engine.read(file, 0, memoryview(bytearray())).result() == 0
    assert engine.write(file, 0, memoryview(b"")).result() == 0
    assert engine.statistics().blocks == 0


def test_many_threads_share_an_engine(world: World) -> None:
    contents = pattern(64 * PAGE)
    engine = world.engine(block_nbytes=PAGE)
    file = engine.open(world.put(engine, contents))
    views = [world.buffer(16 * PAGE) for _ in range(4)]
    wrong: list[int] = []

    def work(number: int) -> None:
        dice = random.Random(number)
        for _ in range(4):
            begin = dice.randint(0, 48) * PAGE
            engine.read(file, begin, views[number], priority=dice.randint(-2, 2)).result()
            if views[number] != contents[begin : begin + 16 * PAGE]:
                wrong.append(begin)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    found = engine.statistics()
    assert (found.blocks, found.read_bytes, found.in_flight) == (256, 256 * PAGE, 0)
    assert 0 < found.peak_in_flight <= 4
    assert found.busy_s > 0


def test_callbacks_that_raise_harm_nobody(world: World) -> None:
    engine = world.engine(threads=1)
    file = engine.open(world.put(engine, pattern(PAGE)))
    views = [world.buffer(PAGE) for _ in range(6)]

    def fail(_: object) -> None:
        raise SystemExit("from a callback")

    futures = []
    for view in views:
        future = engine.read(file, 0, view)
        try:
            future.add_done_callback(fail)
        except SystemExit:  # it was done already, and the callback ran here
            assert future.done()
        futures.append(future)
    done, pending = wait(futures, timeout=HANGS_S)
    assert not pending
    assert {future.result() for future in done} == {PAGE}
    assert engine.read(file, 0, views[0]).result(HANGS_S) == PAGE


def test_a_callback_may_read_on(world: World) -> None:
    """A chain of reads, each submitted by the callback of the one before: no recursion, no deadlock."""
    engine = world.engine()
    file = engine.open(world.put(engine, pattern(PAGE)))
    view, ended, left = world.buffer(PAGE), threading.Event(), [30]

    def read_on(_: object) -> None:
        left[0] -= 1
        if left[0]:
            engine.read(file, 0, view).add_done_callback(read_on)
        else:
            ended.set()

    if world.is_fake:
        engine.backend.hold()  # or the first read would be done before it has its callback
    engine.read(file, 0, view).add_done_callback(read_on)
    if world.is_fake:
        engine.backend.release()
    assert ended.wait(HANGS_S)
    assert left == [0]


def test_close_ends_everything(world: World) -> None:
    before = threading.active_count()
    engine = world.engine(block_nbytes=PAGE)
    contents = pattern(32 * PAGE)
    file = engine.open(world.put(engine, contents), writable=True)
    views = [world.buffer(32 * PAGE) for _ in range(8)]
    futures = [engine.read(file, 0, view) for view in views]
    engine.write(file, 0, world.buffer(PAGE, fill=contents[0])).exception()
    engine.close()
    engine.close()
    assert all(future.done() for future in futures), "close returns when no memory is in use any more"
    for future in futures:
        assert future.exception() is None or isinstance(future.exception(), ClosedError)
    assert threading.active_count() == before
    with pytest.raises(ClosedError):
        engine.read(file, 0, views[0])
    with pytest.raises(ClosedError):
        engine.open(file.path)


def test_cancel_what_is_done_is_too_late(world: World) -> None:
    engine = world.engine()
    file = engine.open(world.put(engine, pattern(PAGE)))
    future = engine.read(file, 0, world.buffer(PAGE))
    future.result()
    assert not engine.cancel(future)
    assert not future.cancel()


def test_typed_and_multidimensional_views(world: World) -> None:
    engine = world.engine()
    contents = pattern(PAGE)
    file = engine.open(world.put(engine, contents))
    view = world.buffer(PAGE)
    assert engine.read(file, 0, view.cast("I", (32, 32))).result() == PAGE
    assert view == contents


def test_the_table_of_backends() -> None:
    with pytest.raises(UsageError, match=r"known are threads, uring, aiofiles$"):
        probe("libaio")
    with pytest.raises(UsageError, match="known are"):
        create("libaio", threads=1)
    assert probe("threads") is None
    assert probe("fake") is None
    for name in BACKENDS:
        reason = probe(name)
        assert reason is None or len(reason) > 10
    for options in ({"threads": 0}, {"block_nbytes": 0}, {"block_nbytes": 5000}):
        with pytest.raises(UsageError):
            Engine("fake", **options)


def test_an_unusable_backend_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    module = importlib.import_module(BACKENDS["uring"])
    monkeypatch.setattr(module.platform, "machine", lambda: "riscv64")
    assert "riscv64" in (probe("uring") or "")
    with pytest.raises(UsageError, match=r"cannot be used here: .*riscv64; use backend='threads'"):
        Engine("uring")
