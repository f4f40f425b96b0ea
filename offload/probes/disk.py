"""How fast a disk reads and writes in sequence, by block size and requests in flight, with the engine that runs use."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from offload.errors import StorageError
from offload.hardware import disk_of
from offload.io.buffers import Buffer
from offload.io.engine import Engine
from offload.io.file import File
from offload.probes.sampling import LEAST_S, Now
from offload.profile import CopyRate
from offload.tiers.swap import unlinked_file
from offload.units import GIB, MIB, format_bytes

FREE_AFTER = 0.05  # of the disk, or else
FREE_NBYTES = 4 * GIB  # are left free
WINDOWS = 6  # parts of a figure whose rates say how far it spreads


@dataclass(frozen=True, slots=True)
class Sustained:
    """Reading for long: bytes per second of the first second, and of the later half."""

    first: float
    later: float
    spread: float


class Stream:
    """Reads or writes a file from its beginning to its end and again, with a number of blocks in flight.

    Args:
        engine: of as many threads as blocks are in flight, or twice that for writes.
        file: at least one block long.
        block_nbytes: a multiple of the file's alignment.
        depth: blocks in flight.
        is_write: overwrites the file with what the memory holds.
        memory: for the blocks, of somebody who closes it; default: its own. Fresh memory can be slower than a disk.
    """

    def __init__(
        self,
        engine: Engine,
        file: File,
        block_nbytes: int,
        depth: int,
        *,
        is_write: bool = False,
        now: Now,
        memory: Buffer | None = None,
    ) -> None:
        assert file.nbytes >= block_nbytes, "the file is shorter than a block"
        self._engine, self._file, self._size, self._write, self._now = engine, file, block_nbytes, is_write, now
        self._own = Buffer(block_nbytes * depth) if memory is None else None
        self._memory = self._own or memory
        assert self._memory is not None
        assert self._memory.nbytes >= block_nbytes * depth, "too little memory"
        if is_write:
            self._memory.view[:] = bytes(range(256)) * (self._memory.nbytes // 256)
        self._flying: deque[tuple[int, Future[int]]] = deque()
        self._depth, self._at = depth, 0

    def run(self, seconds: float, is_over: Callable[[], bool] = lambda: False) -> list[tuple[float, int]]:
        """For so long, or until `is_over`. Returns when blocks ended and how many bytes they had; the first ones, which
        touch the memory, are not among them.
        """
        try:
            for slot in range(self._depth):
                self._submit(slot)
            for _ in range(self._depth):
                self._next()
            ends = [(self._now(), 0)]
            while len(ends) <= self._depth or (self._now() - ends[0][0] < seconds and not is_over()):
                nbytes = self._next()
                ends.append((self._now(), nbytes))
            return ends
        finally:
            while self._flying:  # a buffer may go only when nothing moves into it or out of it
                self._flying.popleft()[1].exception()

    def once(self) -> None:
        """All whole blocks of the file once."""
        futures = []
        try:
            for at in range(0, self._file.nbytes - self._size + 1, self._size):
                move = self._engine.write if self._write else self._engine.read
                futures.append(move(self._file, at, self._memory.view[: self._size]))
        finally:
            for future in futures:
                future.result()

    def close(self) -> None:
        if self._own is not None:
            self._own.close()

    def _next(self) -> int:
        slot, future = self._flying.popleft()
        nbytes = future.result()
        self._submit(slot)
        return nbytes

    def _submit(self, slot: int) -> None:
        view = self._memory.view[slot * self._size : (slot + 1) * self._size]
        move = self._engine.write if self._write else self._engine.read
        self._flying.append((slot, move(self._file, self._at, view)))
        self._at += self._size
        if self._at + self._size > self._file.nbytes:
            self._at = 0


@contextmanager
def stream(
    path: Path, block_nbytes: int, depth: int, *, fd: int | None = None, is_write: bool = False,
    backend: str = "threads", now: Now = time.perf_counter, memory: Buffer | None = None,
) -> Iterator[Stream]:  # fmt: skip
    """A stream with an engine of its own.

    Args:
        fd: a descriptor of the file, which is duplicated; else it is opened by its path.
    """

    threads = 2 * depth if is_write else depth  # half as many writes as reads are in flight
    with Engine(backend, threads=threads, block_nbytes=block_nbytes) as engine:
        file = engine.open(path, writable=is_write, fd=None if fd is None else os.dup(fd))
        one = Stream(engine, file, block_nbytes, depth, is_write=is_write, now=now, memory=memory)
        try:
            yield one
        finally:
            one.close()


def rates(
    path: Path, blocks: Sequence[tuple[int, int]], seconds: float, *, fd: int | None = None, is_write: bool = False,
    now: Now = time.perf_counter, memory: Buffer | None = None,
) -> Iterator[CopyRate]:  # fmt: skip
    """A figure for each (bytes of a block, blocks in flight) that the file is long enough for."""
    nbytes = path.stat().st_size if fd is None else _size(fd)
    for block_nbytes, depth in blocks:
        if block_nbytes > nbytes:
            continue
        with stream(path, block_nbytes, depth, fd=fd, is_write=is_write, now=now, memory=memory) as one:
            ends = one.run(seconds)
        yield CopyRate(block_nbytes, depth, rate_of(ends), _spread(ends))


def sustained(
    path: Path, best: CopyRate, seconds: float, *, fd: int | None = None, now: Now = time.perf_counter,
    memory: Buffer | None = None,
) -> Sustained:  # fmt: skip
    """Reads for so long with the blocks that were fastest."""
    with stream(path, best.nbytes, best.threads, fd=fd, now=now, memory=memory) as one:
        ends = one.run(seconds)
    began = ends[0][0]
    first = sum(end[0] - began <= 1.0 for end in ends)
    middle = sum(end[0] - began < (ends[-1][0] - began) / 2 for end in ends)
    later = ends[min(middle, len(ends) - 2) :]
    return Sustained(rate_of(ends[: max(2, first)]), rate_of(later), _spread(later))


def rate_of(ends: Sequence[tuple[float, int]]) -> float:
    """Bytes per second from the first end to the last."""
    passed = ends[-1][0] - ends[0][0]
    return float(round(max(1.0, sum(nbytes for _, nbytes in ends[1:]) / max(passed, LEAST_S))))


def _spread(ends: Sequence[tuple[float, int]]) -> float:
    """Relative: how far the rates of parts lie from their median."""
    size = max(1, (len(ends) - 1) // WINDOWS)
    parts = [rate_of(ends[k : k + size + 1]) for k in range(0, len(ends) - size, size)]
    middle = median(parts)
    return median(abs(part - middle) for part in parts) / middle


@contextmanager
def scratch(folder: Path, nbytes: int) -> Iterator[tuple[Path, int]]:
    """A file without a name on the disk of `folder`, of at most a tenth of what is free: (the name it had, descriptor).

    Raises:
        StorageError: the disk is nearly full, or the folder is not writable.
    """

    facts = disk_of(folder)
    nbytes = min(nbytes, facts.free // 10) // MIB * MIB if nbytes >= MIB else nbytes
    if not nbytes or facts.free - nbytes < min(FREE_AFTER * facts.total, FREE_NBYTES):
        raise StorageError(
            f"the disk is nearly full: {format_bytes(facts.free)} of {format_bytes(facts.total)} are free, so writing "
            "is not measured there; free some space or name another folder with --offload-dir",
            path=str(folder),
        )
    path, fd = unlinked_file(folder, nbytes)
    try:
        yield Path(path), fd
    finally:
        os.close(fd)


def fill(path: Path, fd: int, now: Now = time.perf_counter) -> None:
    """Writes a scratch file once: space that was only reserved reads as zeros without a disk, and is written slower."""
    size = _size(fd)
    block_nbytes = min(4 * MIB, size)
    with stream(path, block_nbytes, min(4, size // block_nbytes), fd=fd, is_write=True, now=now) as one:
        one.once()


def fallbacks(path: Path, fd: int | None) -> tuple[str, ...]:
    """Why reads of the file go through the page cache, if they do."""
    with Engine() as engine:
        engine.open(path, fd=None if fd is None else os.dup(fd))
        return engine.fallbacks


def _size(fd: int) -> int:
    return os.fstat(fd).st_size
