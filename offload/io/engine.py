"""The engine: takes reads and writes, keeps the disk busy with the most urgent blocks, and resolves futures."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType

from offload.errors import ClosedError, OffloadError, StorageError, UsageError
from offload.io.backends import Backend, Block, create
from offload.io.extents import ALIGNMENT
from offload.io.file import Fallbacks, File
from offload.io.parts import Parts
from offload.io.requests import Lane, Piece, Request, Transfer
from offload.units import GIB, MIB


@dataclass(frozen=True, slots=True)
class IOStatistics:
    """Since the engine was made. Bytes are those transferred for callers, padding of aligned reads included.

    Attributes:
        retries: transfers that were started again: after a short one, EINTR, EAGAIN or a refused direct one.
        in_flight: blocks with the backend now.
        busy_s: seconds with at least one block in flight.
    """

    read_bytes: int
    write_bytes: int
    read_requests: int
    write_requests: int
    blocks: int
    errors: int
    retries: int
    in_flight: int
    peak_in_flight: int
    busy_s: float


class Engine:
    """Asynchronous reads and writes. Safe for threads; a context manager that closes itself.

    Callers bound the queue: what is submitted waits in memory until its blocks are started. The caller lends each
    view until its future resolves, and gets it back with it, whatever the outcome.

    Args:
        backend: a name in BACKENDS, or a backend made elsewhere, which the engine then owns.
        threads: reads in flight at most; half as many writes.
        block_nbytes: bytes of the largest single transfer, a multiple of 4096.
        direct: bypass the page cache where the file system lets us.
        strict: a refused O_DIRECT is a StrictError, not a line in `fallbacks`.
    """

    def __init__(
        self, backend: str | Backend = "threads", *, threads: int = 8, block_nbytes: int = 4 * MIB, direct: bool = True,
        strict: bool = False,
    ) -> None:  # fmt: skip
        if threads < 1:
            raise UsageError(f"threads={threads}: an I/O engine needs at least 1")
        if block_nbytes < ALIGNMENT or block_nbytes % ALIGNMENT or block_nbytes > GIB:
            raise UsageError(f"block_nbytes={block_nbytes:,} must be a multiple of {ALIGNMENT} and at most 1 GiB")
        self._backend = create(backend, threads=threads) if isinstance(backend, str) else backend
        self._block_nbytes, self._wants_direct = block_nbytes, direct
        self._fallbacks = Fallbacks(is_strict=strict)
        self._reads, self._writes = Lane(self._backend.read_depth), Lane(self._backend.write_depth)
        self._files: list[File] = []  # open ones; a handful, so that a list is the right index
        self._is_closed = self._is_shut = False
        self._changed = threading.Condition(threading.Lock())  # guards all that follows, lanes and requests too
        self._starting = threading.local()
        self._submitted = self._resolved = 0
        self._started = self._completed = self._errors = self._retries = self._peak = 0
        self._nbytes, self._requests = [0, 0], [0, 0]  # by direction: reads, writes
        self._busy_s, self._busy_since = 0.0, 0.0

    @property
    def backend(self) -> Backend:
        """What moves the bytes."""
        return self._backend

    @property
    def block_nbytes(self) -> int:
        """Bytes of the largest single transfer."""
        return self._block_nbytes

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """Which files are served buffered although direct I/O was asked for, and why."""
        return self._fallbacks.lines()

    def open(self, path: str | os.PathLike[str], *, writable: bool = False, fd: int | None = None) -> File:
        """Open an existing regular file, or lend the File that is open for the path already.

        Args:
            path: of the file; with `fd` only its name in messages.
            writable: for writes too.
            fd: a descriptor opened by the caller, owned by the File from now on, even when this raises.

        Raises:
            StorageError: missing, not permitted, or not a regular file.
            StrictError: direct I/O is refused in strict mode.
        """
        name = os.path.abspath(os.fspath(path))
        with self._changed:
            files = list(self._files)
            is_closed = self._is_closed
        if is_closed:
            if fd is not None:
                self._backend.files.close(fd)
            self._check_open()
        if fd is None:
            identity = self._backend.files.identity(name)  # the path may lead to a newer file than the open one
            for file in files:
                if file.path == name and file.identity == identity and file.is_writable >= writable and file.borrow():
                    return file
        file = File(
            self._backend.files, name, self._fallbacks, self._forget, is_writable=writable,
            wants_direct=self._wants_direct, adopted=fd,
        )  # fmt: skip
        with self._changed:
            if not self._is_closed:
                self._files.append(file)
                return file
        file.close()
        raise ClosedError("the I/O engine was closed")

    def read(
        self, file: File, offset: int, view: memoryview | Sequence[memoryview], *, need: int | None = None,
        priority: int = 0,
    ) -> Future[int]:  # fmt: skip
        """Fill `view` from the file's byte `offset`; the future gives the bytes that arrived.

        Args:
            file: from open().
            offset: bytes; on a direct file a multiple of its alignment, as are the view's address and length.
            view: contiguous writable memory, lent until the future resolves; or several, filled one after the other.
            need: bytes that must arrive, all by default; the rest may lie past the end of the file.
            priority: the lowest number is served first, equals in order.

        Returns:
            A future that fails with StorageError when a transfer fails or the file ends before `need` bytes.
        """
        views = [one.cast("B") for one in ([view] if isinstance(view, memoryview) else view)]
        assert not any(one.readonly for one in views), "a read needs writable memory"
        parts = Parts(views)
        return self._submit(file, offset, parts, parts.nbytes if need is None else need, priority, is_write=False)

    def write(self, file: File, offset: int, view: memoryview, *, priority: int = 0) -> Future[int]:
        """Write `view` at the file's byte `offset`; as read(), in a queue and with a depth of its own."""
        assert file.is_writable, f"{file.path} was opened for reading only"
        parts = Parts([view.cast("B")])
        return self._submit(file, offset, parts, parts.nbytes, priority, is_write=True)

    def fsync(self, file: File) -> None:
        """Wait until what was written is durable. Covers writes whose futures have resolved. Raises StorageError."""
        file.sync()

    def cancel(self, future: Future[int]) -> bool:
        """Drop the blocks of a request that are not started yet.

        Returns:
            True when there were any: the future is cancelled once the started ones have ended. False when all are
            started or done: the future resolves as usual.
        """
        assert isinstance(future, Transfer), "not a future of this engine"
        with self._changed:
            request = future.request
            if request is None or not request.is_queued:
                return False
            request.is_cancelled = True
            is_settled = request.is_settled
            self._resolved += is_settled
        if is_settled:
            request.resolve()
        return True

    def statistics(self) -> IOStatistics:
        """A snapshot."""
        with self._changed:
            in_flight = self._reads.in_flight + self._writes.in_flight
            running_s = time.perf_counter() - self._busy_since if in_flight else 0.0
            return IOStatistics(
                self._nbytes[0], self._nbytes[1], self._requests[0], self._requests[1], self._started, self._errors,
                self._retries, in_flight, self._peak, self._busy_s + running_s,
            )  # fmt: skip

    def check_integrity(self) -> None:
        """Assert the conservation laws of blocks and requests."""
        with self._changed:
            in_flight = self._reads.in_flight + self._writes.in_flight
            assert self._started == self._completed + in_flight, (self._started, self._completed, in_flight)
            assert 0 <= self._resolved <= self._submitted, (self._resolved, self._submitted)
            assert in_flight == 0 or self._resolved < self._submitted, "blocks in flight without a request"
            assert 0 <= self._reads.in_flight <= self._reads.depth, self._reads.in_flight
            assert 0 <= self._writes.in_flight <= self._writes.depth, self._writes.in_flight

    def close(self) -> None:
        """Fail what is queued with ClosedError, wait for what is in flight, end the threads, close the files.

        May be called twice, but not from the callback of a future: it waits for the thread that runs those.
        """
        with self._changed:
            self._is_closed = True
            dropped = self._reads.drain() + self._writes.drain()
            settled = [request for request in dropped if request.is_settled]
            self._resolved += len(settled)
        for request in settled:
            request.resolve()
        with self._changed:
            # Waits for memory that a transfer may still touch, which no caller may get back earlier.
            self._changed.wait_for(lambda: self._reads.in_flight + self._writes.in_flight == 0)
            if self._is_shut:
                return
            self._is_shut = True
            files = list(self._files)
        self._backend.close()
        for file in files:
            file.close_all()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _submit(
        self, file: File, offset: int, parts: Parts, need: int, priority: int, *, is_write: bool
    ) -> Future[int]:
        alignment, nbytes = file.alignment, parts.nbytes
        assert offset >= 0, offset
        assert 0 <= need <= nbytes, (need, nbytes)
        assert nbytes == 0 or (offset % alignment == 0 and parts.has_multiples_of(alignment)), (
            f"direct I/O on {file.path} needs multiples of {alignment}: offset {offset}, {parts}"
        )
        size = -(-self._block_nbytes // file.block_alignment) * file.block_alignment
        future = Transfer(self.cancel)
        file.begin_request()
        request = Request(file, offset, parts, need, size, future, self._finish, is_write=is_write)
        pieces: list[Piece] = []
        try:
            with self._changed:
                self._check_open()
                self._submitted += 1
                self._requests[is_write] += 1
                if request.is_queued:
                    (self._writes if is_write else self._reads).push(request, priority)
                    pieces = self._take()
                else:  # nothing to transfer
                    self._resolved += 1
        except ClosedError:
            file.end_request()
            raise
        if nbytes == 0:
            request.resolve()
        self._start(pieces)
        return future

    def _take(self) -> list[Piece]:
        """Pieces to start, counted as in flight. Reads go first. Called under the lock."""
        before = self._reads.in_flight + self._writes.in_flight
        pieces = self._reads.take() + self._writes.take()
        if pieces and before == 0:
            self._busy_since = time.perf_counter()
        self._started += len(pieces)
        self._peak = max(self._peak, before + len(pieces))
        return pieces

    def _start(self, blocks: Sequence[Block]) -> None:
        """Hand blocks to the backend. One that completes a block inside start() comes back here through _finish(): the
        queue of the thread turns that recursion into a loop."""
        waiting: deque[Sequence[Block]] | None = getattr(self._starting, "waiting", None)
        if waiting is not None:
            waiting.append(blocks)
            return
        waiting = self._starting.waiting = deque([blocks])
        try:
            while waiting:
                if batch := waiting.popleft():
                    self._backend.start(batch)
        finally:
            self._starting.waiting = None

    def _finish(self, piece: Piece, result: int | OSError) -> None:
        """The end of one transfer of a block, in whatever thread the backend has for it."""
        request, before = piece.request, piece.position
        error: OffloadError | None = None
        try:
            is_again = piece.judge(result)
        except OffloadError as found:
            is_again, error = False, found.with_traceback(None)  # its frames would hold the caller's memory
        except OSError as found:
            is_again, verb = False, "write" if request.is_write else "read"
            error = StorageError(
                f"a {verb} failed: {found.strerror}", path=request.file.path, offset=request.offset + piece.position,
                errno=found.errno,
            )  # fmt: skip
            error.__cause__ = found.with_traceback(None)
        except Exception as found:  # a bug of ours must fail its request, not leave the caller waiting
            is_again, error = False, StorageError(f"internal error: {found!r}", path=request.file.path)
            error.__cause__ = found
        with self._changed:
            arrived = piece.position - before
            request.arrived += arrived
            self._nbytes[request.is_write] += arrived
            if is_again:
                self._retries += 1
            else:
                (self._writes if request.is_write else self._reads).end(piece)
                self._completed += 1
                if error is not None:
                    self._errors += 1
                    request.error = request.error or error
                is_settled = request.is_settled
                self._resolved += is_settled
                if self._reads.in_flight + self._writes.in_flight == 0:
                    self._busy_s += time.perf_counter() - self._busy_since
                    self._changed.notify_all()
                pieces = self._take()
        if is_again:
            self._start([piece])
            return
        self._start(pieces)  # first the disk, then the caller
        if is_settled:
            request.resolve()

    def _forget(self, file: File) -> None:
        with self._changed:
            if file in self._files:
                self._files.remove(file)

    def _check_open(self) -> None:
        if self._is_closed:
            raise ClosedError("the I/O engine was closed")
