"""What only real files show: tmpfs, statx, identity without /proc, inherited descriptors, and a measured rate."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from io_worlds import PAGE, pattern

from offload.errors import StorageError, UsageError
from offload.io.backends import probe, uring
from offload.io.buffers import Buffer
from offload.io.engine import Engine
from offload.io.osfiles import OsFiles
from offload.io.rate import read_rate

SHM = Path("/dev/shm")
REAL = [name for name in ("threads", "uring", "aiofiles") if probe(name) is None]


@pytest.fixture
def shm_file() -> Iterator[Path]:
    if not SHM.is_dir() or not os.access(SHM, os.W_OK):
        pytest.skip("there is no /dev/shm to write to")
    with tempfile.TemporaryDirectory(dir=SHM) as directory:
        path = Path(directory) / "file"
        path.write_bytes(pattern(5 * PAGE + 9))
        yield path


@pytest.mark.parametrize("backend", REAL)
def test_tmpfs_gives_the_same_bytes(shm_file: Path, backend: str) -> None:
    """Older kernels refuse O_DIRECT on tmpfs, newer ones take it: the bytes are the same and a refusal is told."""
    with Engine(backend, block_nbytes=PAGE) as engine:
        file = engine.open(shm_file)
        buffer = Buffer(6 * PAGE)
        assert engine.read(file, 0, buffer.view, need=5 * PAGE + 9).result() == 5 * PAGE + 9
        assert buffer.view[: 5 * PAGE + 9] == shm_file.read_bytes()
        assert len(engine.fallbacks) == (not file.is_direct)
        engine.check_integrity()


@pytest.mark.parametrize("backend", REAL)
@pytest.mark.parametrize("where", ["open", "transfer"])
def test_a_file_system_without_direct_io(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, backend: str
) -> None:
    contents = pattern(9 * PAGE + 5)
    (tmp_path / "file").write_bytes(contents)
    if where == "open":

        def refuse(self: OsFiles, fd: int, path: str, *, is_writable: bool) -> int:
            raise OSError(errno.EINVAL, "refused")

        monkeypatch.setattr(OsFiles, "open_direct", refuse)
    else:
        monkeypatch.setattr(OsFiles, "alignment", lambda self, fd: 1)  # so that the kernel refuses what we then do
    with Engine(backend, block_nbytes=PAGE) as engine:
        file = engine.open(tmp_path / "file")
        memory = bytearray(len(contents) - 3)
        assert engine.read(file, 3, memoryview(memory)).result() == len(memory)
        assert memory == contents[3:]
        assert not file.is_direct
        assert len(engine.fallbacks) == 1
        engine.check_integrity()


@pytest.mark.skipif("uring" not in REAL, reason="the kernel has no io_uring")
def test_a_ring_that_cannot_wait_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(pattern(9 * PAGE))
    enter = uring._enter

    def refuse_to_wait(fd: int, submitted: int, wanted: int, flags: int) -> int:
        return -errno.ENOMEM if wanted else enter(fd, submitted, wanted, flags)

    monkeypatch.setattr(uring, "_enter", refuse_to_wait)
    monkeypatch.setattr(uring, "_PAUSE_S", 0)
    with Engine("uring", block_nbytes=PAGE) as engine:
        buffer = Buffer(9 * PAGE)
        assert engine.read(engine.open(tmp_path / "file"), 0, buffer.view).result() == 9 * PAGE
        assert buffer.view == pattern(9 * PAGE)
        engine.check_integrity()
    assert caplog.text.count("cannot wait") == 1


def test_alignment_comes_from_the_kernel(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    files = OsFiles()
    fd = files.open(str(tmp_path / "file"), is_writable=False)
    alignment = files.alignment(fd)
    assert alignment == 0 or alignment & (alignment - 1) == 0
    status = files.status(fd)
    assert (status.nbytes, status.is_regular) == (1, True)
    assert status.identity == files.identity(str(tmp_path / "file"))
    files.close(fd)
    assert files.identity(str(tmp_path / "missing")) is None


@pytest.mark.parametrize("backend", REAL)
def test_without_proc_the_path_is_trusted_only_for_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    plain_open = os.open

    def open_without_proc(path, flags, *rest, **named):
        if str(path).startswith("/proc/"):
            raise FileNotFoundError(errno.ENOENT, "no /proc")
        return plain_open(path, flags, *rest, **named)

    path = tmp_path / "file"
    path.write_bytes(pattern(PAGE))
    files = OsFiles()
    fd = files.open(str(path), is_writable=False)
    monkeypatch.setattr(os, "open", open_without_proc)
    os.close(files.reopen(fd, str(path), os.O_RDONLY))
    with Engine(backend) as engine:
        file = engine.open(path)
        assert engine.read(file, 0, Buffer(PAGE).view).result() == PAGE
    path.unlink()
    for newer in (None, pattern(PAGE, 1)):
        if newer:
            path.write_bytes(newer)
        with pytest.raises(OSError, match="cannot be reopened"):
            files.reopen(fd, str(path), os.O_RDONLY)
    os.close(fd)


def test_descriptors_are_not_inherited(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(pattern(PAGE))
    adopted = os.open(tmp_path / "file", os.O_RDWR)
    os.set_inheritable(adopted, True)
    with Engine("threads") as engine:
        engine.open(tmp_path / "file")
        engine.open(tmp_path / "file", writable=True, fd=adopted)
        code = "import os; print([os.path.realpath(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd')])"
        command = [sys.executable, "-c", code]
        found = subprocess.run(command, check=True, capture_output=True, text=True, close_fds=False).stdout
        assert str(tmp_path) not in found


def test_an_adopted_direct_descriptor_serves_buffered_requests_too(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(pattern(2 * PAGE))
    try:
        fd = os.open(tmp_path / "file", os.O_RDWR | os.O_DIRECT)
    except OSError:
        pytest.skip("the file system of tmp_path refuses O_DIRECT")
    with Engine("threads", direct=False) as engine:
        file = engine.open("a name", writable=True, fd=fd)
        memory = bytearray(5)
        assert engine.read(file, 3, memoryview(memory)).result() == 5
        assert memory == pattern(2 * PAGE)[3:8]


def test_an_adopted_descriptor_is_closed_on_errors(tmp_path: Path) -> None:
    from offload.errors import ClosedError

    engine = Engine("threads")
    fd = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(StorageError, match="not a regular file"):
        engine.open("a name", fd=fd)
    engine.close()
    other = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(ClosedError):
        engine.open("a name", fd=other)
    for number in (fd, other):
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(number)


@pytest.mark.parametrize("nbytes", [1, PAGE, 300 * PAGE + 5])
def test_rate(tmp_path: Path, nbytes: int) -> None:
    (tmp_path / "file").write_bytes(pattern(nbytes))
    assert read_rate(tmp_path / "file", seconds=0, threads=2, block_nbytes=64 * PAGE) > 0
    buffer = Buffer(40 * PAGE)
    assert read_rate(tmp_path / "file", seconds=0.001, buffer=buffer, threads=2) > 0
    buffer.view[0] = 1  # still the caller's
    with pytest.raises(UsageError, match="buffer"):
        read_rate(tmp_path / "file", buffer=Buffer(PAGE), threads=2)


def test_rate_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match="empty"):
        read_rate(tmp_path / "file")
    with pytest.raises(StorageError):
        read_rate(tmp_path / "missing")
