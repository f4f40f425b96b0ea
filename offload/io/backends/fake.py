"""Files in memory with faults on demand: what a disk can do wrong, in a chosen order and without waiting."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from offload.io.backends.base import Block, FileStatus
from offload.io.extents import ALIGNMENT

Operation = Literal["read", "write", "open", "fsync"]


def probe() -> str | None:
    """Always usable."""
    return None


def create(threads: int) -> FakeBackend:
    """An empty disk with that many reads in flight and half as many writes."""
    return FakeBackend(threads)


@dataclass(slots=True)
class _Fault:
    number: int
    operation: Operation | None
    countdown: int
    is_lasting: bool


class FakeDisk:
    """The files, by absolute path, and the faults; also the Files of the fake backend. Safe for threads.

    Attributes:
        direct_alignment: bytes that direct transfers must be aligned to; 0 says that there is no direct I/O.
        refuses_direct: "open" or "transfer" gives EINVAL there; None never.
        capacity: bytes of all files together, beyond which a write is ENOSPC; None is endless.
        operations: transfers, opens and fsyncs attempted, faulty ones included.
        synced: paths in the order of their fsyncs.
    """

    def __init__(self) -> None:
        self.direct_alignment = ALIGNMENT
        self.refuses_direct: Literal["open", "transfer"] | None = None
        self.capacity: int | None = None
        self.operations = 0
        self.synced: list[str] = []
        self._contents: dict[str, bytearray] = {}
        self._open: dict[int, tuple[bytearray, str, bool]] = {}  # contents, path, is_direct
        self._faults: list[_Fault] = []
        self._random: random.Random | None = None
        self._next_fd = 1000
        self._lock = threading.RLock()

    def put(self, path: str | os.PathLike[str], contents: bytes) -> str:
        """Create or replace a file, leaving the old one to those who have it open. Returns the absolute path."""
        name = os.path.abspath(os.fspath(path))
        with self._lock:
            self._contents[name] = bytearray(contents)
        return name

    def get(self, path: str | os.PathLike[str]) -> bytes:
        """A copy of a file's contents."""
        with self._lock:
            return bytes(self._contents[os.path.abspath(os.fspath(path))])

    def remove(self, path: str | os.PathLike[str]) -> None:
        """Unlink; open descriptors keep the contents."""
        with self._lock:
            del self._contents[os.path.abspath(os.fspath(path))]

    def truncate(self, path: str | os.PathLike[str], nbytes: int) -> None:
        """Cut a file, also for those who have it open."""
        with self._lock:
            del self._contents[os.path.abspath(os.fspath(path))][nbytes:]

    def fail(
        self, number: int, *, at: int = 1, operation: Operation | None = None, is_lasting: bool = False
    ) -> None:  # fmt: skip
        """Make the `at`-th operation from now (of one kind, or of any) fail with an errno, once or for ever."""
        with self._lock:
            self._faults.append(_Fault(number, operation, at, is_lasting))

    def shorten(self, seed: int | None) -> None:
        """Let transfers be short at random from now on, but never empty; None ends that.

        Direct ones end at whole sectors, an eighth of the alignment, as on a disk.
        """
        with self._lock:
            self._random = None if seed is None else random.Random(seed)

    def heal(self) -> None:
        """Forget every fault."""
        with self._lock:
            self._faults.clear()
            self._random, self.refuses_direct, self.capacity = None, None, None

    @property
    def open_descriptors(self) -> int:
        """How many are open now: 0 after everything was closed, or something leaks."""
        with self._lock:
            return len(self._open)

    def transfer(self, block: Block) -> int:
        """Move a block's bytes. Raises OSError as the disk would."""
        with self._lock:
            contents, _, is_direct = self._open[block.fd]
            self._meet_faults("write" if block.is_write else "read")
            if is_direct:
                self._check_direct(block)
            nbytes = sum(part.view.nbytes for part in block.parts)
            if self._random is not None and nbytes > 1:
                sector = max(1, self.direct_alignment // 8) if is_direct else 1  # a disk moves whole sectors
                nbytes = min(nbytes, self._random.randint(1, -(-nbytes // sector)) * sector)
            end = block.offset + nbytes
            if not block.is_write:
                found = memoryview(contents)[block.offset : end]
                moved = 0
                for part in block.parts:
                    piece = found[moved : moved + part.view.nbytes]
                    part.view[: piece.nbytes] = piece
                    moved += piece.nbytes
                found.release()
                return moved
            if self.capacity is not None:
                used = sum(map(len, self._contents.values()))
                if used + max(0, end - len(contents)) > self.capacity:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            contents.extend(bytes(max(0, block.offset - len(contents))))
            contents[block.offset : end] = b"".join(part.view for part in block.parts)[:nbytes]
            return nbytes

    def open(self, path: str, *, is_writable: bool) -> int:
        """A buffered descriptor."""
        with self._lock:
            self._meet_faults("open")
            if path not in self._contents:
                raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
            return self._descriptor(self._contents[path], path, is_direct=False)

    def adopt(self, fd: int) -> int:
        """Descriptors from open() on this disk only."""
        with self._lock:
            if fd not in self._open:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            return fd

    def open_direct(self, fd: int, path: str, *, is_writable: bool) -> int:
        """EINVAL when told so."""
        with self._lock:
            if self.refuses_direct == "open":
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return self._descriptor(*self._open[fd][:2], is_direct=True)

    def alignment(self, fd: int) -> int:
        """As set."""
        return self.direct_alignment

    def status(self, fd: int) -> FileStatus:
        """Always a regular file."""
        with self._lock:
            contents = self._open[fd][0]
            return FileStatus(len(contents), True, (0, id(contents)))

    def identity(self, path: str) -> tuple[int, int] | None:
        """Of the contents object."""
        with self._lock:
            return (0, id(self._contents[path])) if path in self._contents else None

    def sync(self, fd: int) -> None:
        """Remembered in `synced`."""
        with self._lock:
            self._meet_faults("fsync")
            self.synced.append(self._open[fd][1])

    def close(self, fd: int) -> None:
        """A second close is a KeyError: nothing may close what it does not own."""
        with self._lock:
            del self._open[fd]

    def _descriptor(self, contents: bytearray, path: str, *, is_direct: bool) -> int:
        self._next_fd += 1
        self._open[self._next_fd] = (contents, path, is_direct)
        return self._next_fd

    def _check_direct(self, block: Block) -> None:
        alignment = max(self.direct_alignment, 1)
        is_aligned = not any((block.offset | part.address | part.view.nbytes) % alignment for part in block.parts)
        if self.refuses_direct == "transfer" or not is_aligned:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    def _meet_faults(self, operation: Operation) -> None:
        self.operations += 1
        hit: int | None = None
        for fault in list(self._faults):
            if fault.operation not in (None, operation):
                continue
            fault.countdown -= 1
            if fault.countdown <= 0:
                hit = fault.number
                if not fault.is_lasting:
                    self._faults.remove(fault)
        if hit is not None:
            raise OSError(hit, os.strerror(hit))


class FakeBackend:
    """Completes blocks inside start(), or, after hold(), when the test says so: in any order, without a clock.

    The bytes move at completion, never earlier, so memory that was given back too soon shows.

    Attributes:
        disk: the files and faults.
    """

    name = "fake"

    def __init__(self, threads: int = 8, disk: FakeDisk | None = None) -> None:
        self.disk = self.files = disk or FakeDisk()
        self.read_depth, self.write_depth = threads, max(1, threads // 2)
        self._held: list[Block] = []
        self._is_holding = False
        self._lock = threading.Lock()

    def start(self, blocks: Sequence[Block]) -> None:
        """Complete the blocks now, or keep them."""
        with self._lock:
            if self._is_holding:
                self._held.extend(blocks)
                return
        for block in blocks:
            self._run(block)

    def hold(self) -> None:
        """Keep blocks from now on."""
        with self._lock:
            self._is_holding = True

    @property
    def held(self) -> tuple[Block, ...]:
        """The blocks that wait for step(), oldest first."""
        with self._lock:
            return tuple(self._held)

    def step(self, index: int = 0) -> None:
        """Complete one held block."""
        with self._lock:
            block = self._held.pop(index)
        self._run(block)

    def release(self, order: random.Random | None = None) -> None:
        """Complete all that is held, at random when given a generator, and hold nothing any more."""
        with self._lock:
            self._is_holding = False
        while held := self.held:
            self.step(order.randrange(len(held)) if order else 0)

    def close(self) -> None:
        """Nothing to end: the engine has waited for every block."""
        assert not self._held, "closed with blocks in flight"

    def _run(self, block: Block) -> None:
        result: int | OSError
        try:
            result = self.disk.transfer(block)
        except OSError as error:
            result = error
        block.complete(result)
