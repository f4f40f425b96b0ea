"""One read or write of a caller: its future, the blocks it is cut into, and what the end of each block means."""

from __future__ import annotations

import errno
import heapq
import logging
from collections.abc import Callable
from concurrent.futures import Future

from offload.errors import ClosedError, OffloadError, StorageError
from offload.io.backends.base import Block
from offload.io.file import File
from offload.io.parts import NOTHING, Parts
from offload.units import MIB

_log = logging.getLogger("offload.io")
BESIDE = 16 * MIB  # in flight, with which a disk has no pause: it moves less while somebody asks for the next block
_STALLS = 100  # transfers in a row without a byte of progress before a block fails: bounded, so nothing spins


class Transfer(Future[int]):
    """The future of a request. Resolves only when no block of it is in flight, so the memory is the caller's again."""

    def __init__(self, cancel: Callable[[Transfer], bool]) -> None:
        super().__init__()
        self._cancel = cancel
        self.request: Request | None = None  # None once resolved, so that an old future holds no memory

    def cancel(self) -> bool:
        """As Engine.cancel(): True when blocks were dropped; the future is cancelled when the started ones ended."""
        return self._cancel(self)

    def finish_cancel(self) -> None:
        """Become cancelled now."""
        super().cancel()
        self.set_running_or_notify_cancel()


class Request:
    """A range of a file and the memory for it. Its counts change only under the engine's lock."""

    __slots__ = (
        "arrived", "block_nbytes", "cursor", "error", "file", "future", "in_flight", "is_cancelled", "is_write", "need",
        "offset", "parts", "rank", "report",
    )  # fmt: skip

    def __init__(
        self, file: File, offset: int, parts: Parts, need: int, block_nbytes: int, future: Transfer,
        report: Callable[[Piece, int | OSError], None], *, is_write: bool,
    ) -> None:  # fmt: skip
        self.file, self.offset, self.parts, self.need = file, offset, parts, need
        self.block_nbytes, self.future, self.report, self.is_write = block_nbytes, future, report, is_write
        self.cursor = self.in_flight = self.arrived = 0
        self.rank = (0, 0)  # its place in the queue
        self.error: OffloadError | None = None
        self.is_cancelled = False
        future.request = self

    @property
    def is_queued(self) -> bool:
        """Some of it is still to be started."""
        return self.cursor < self.parts.nbytes and self.error is None and not self.is_cancelled

    @property
    def is_settled(self) -> bool:
        """Nothing of it is in flight or will be."""
        return self.in_flight == 0 and not self.is_queued

    def next_piece(self) -> Piece:
        """Cut off the next block."""
        begin = self.cursor
        self.cursor = min(begin + self.block_nbytes, self.parts.nbytes)
        self.in_flight += 1
        return Piece(self, begin, self.cursor)

    def resolve(self) -> None:
        """Give the caller the result. Runs the future's callbacks; what they raise is logged and goes no further."""
        future, error = self.future, self.error
        future.request = None
        self.file.end_request()
        self.parts = NOTHING  # it may sit in a queue a little longer; the caller's memory must not
        try:
            if error is not None:
                future.set_exception(error)
            elif self.is_cancelled:
                future.finish_cancel()
            else:
                future.set_result(self.arrived)
        except BaseException:
            _log.exception("a callback of an I/O future raised")


class Piece(Block):
    """One block of a request: bytes `begin` to `end` of its parts, of which those before `position` have arrived."""

    __slots__ = ("begin", "end", "position", "request", "stalls")

    def __init__(self, request: Request, begin: int, end: int) -> None:
        self.request, self.begin, self.end, self.position, self.stalls = request, begin, end, begin, 0
        self.is_write = request.is_write
        self.fd, self.is_direct = request.file.descriptor()
        self._aim(begin)

    @property
    def nbytes(self) -> int:
        """Of the whole block."""
        return self.end - self.begin

    def complete(self, result: int | OSError) -> None:
        """Hand the result to the engine."""
        self.request.report(self, result)

    def judge(self, result: int | OSError) -> bool:
        """Take in a transfer's result: True when the block must be started again, False when it is done.

        Raises:
            OSError: the transfer failed for good.
            OffloadError: as StorageError when the file ends too early, as StrictError when a fall-back is forbidden.
        """
        request, file = self.request, self.request.file
        if isinstance(result, OSError):
            if result.errno == errno.EINVAL and self.is_direct:
                file.fall_back("a direct transfer was refused (EINVAL)")
                self.fd, self.is_direct = file.descriptor()
                self._aim(self.position)
                return True
            if result.errno in (errno.EINTR, errno.EAGAIN):
                return self._stall(result)
            raise result
        reached = self.offset - request.offset + result
        has_moved = reached > self.position
        self.position = max(self.position, reached)
        if self.position >= self.end:
            return False
        if not self.is_write and (result == 0 or request.offset + self.position >= file.current_nbytes()):
            self._check_end()
            return False
        if has_moved:
            self.stalls = 0
        else:
            self._stall(OSError(errno.EIO, f"{_STALLS} transfers in a row made no progress"))
        # A direct transfer must start aligned: some bytes that have arrived are transferred again.
        self.fd, self.is_direct = file.descriptor()
        alignment = file.alignment
        self._aim(self.position // alignment * alignment)
        return True

    def _aim(self, begin: int) -> None:
        request = self.request
        self.offset, self.parts = request.offset + begin, request.parts.cut(begin, self.end)

    def _stall(self, error: OSError) -> bool:
        self.stalls += 1
        if self.stalls >= _STALLS:
            raise error
        return True

    def _check_end(self) -> None:
        request = self.request
        needed = min(self.end, request.need)
        if self.position < needed:
            raise StorageError(
                f"the file ends at byte {request.offset + self.position:,} but a read needs it up to byte "
                f"{request.offset + request.need:,}; it was {request.file.nbytes:,} bytes when it was opened",
                path=request.file.path, offset=request.offset + self.position,
            )  # fmt: skip


class Lane:
    """The requests of one direction that have blocks to start, best first. Bounded by what callers submit.

    A disk divides itself among all blocks that it has. So those of a request start beside those of a better one only
    as far as it takes to leave no pause between the two: each is there as early as can be, and its memory is used and
    free for the next one while the disk works on others.

    Attributes:
        depth: blocks in flight at most.
        in_flight: blocks.
    """

    def __init__(self, depth: int) -> None:
        self.depth, self.in_flight = depth, 0
        self._nbytes = 0  # in flight
        self._active: set[Request] = set()  # with blocks in flight
        self._heap: list[tuple[int, int, Request]] = []
        self._count = 0

    def push(self, request: Request, priority: int) -> None:
        """Queue a request behind those with a lower or equal priority number."""
        self._count += 1
        request.rank = (priority, self._count)
        heapq.heappush(self._heap, (priority, self._count, request))

    def take(self) -> list[Piece]:
        """As many blocks as may be started now."""
        pieces: list[Piece] = []
        while self._heap and self.in_flight < self.depth:
            request = self._heap[0][2]
            if request.is_queued:
                if self._nbytes >= BESIDE and any(other.rank < request.rank for other in self._active):
                    break
                piece = request.next_piece()
                pieces.append(piece)
                self.in_flight += 1
                self._nbytes += piece.nbytes
                self._active.add(request)
            if not request.is_queued:
                heapq.heappop(self._heap)
        return pieces

    def end(self, piece: Piece) -> None:
        """A block is no longer in flight."""
        request = piece.request
        self.in_flight -= 1
        self._nbytes -= piece.nbytes
        request.in_flight -= 1
        if not request.in_flight:
            self._active.discard(request)

    def drain(self) -> list[Request]:
        """Take out every request, failing what is not started with ClosedError; returns those that had blocks left."""
        dropped = [request for _, _, request in self._heap if request.is_queued]
        self._heap.clear()
        for request in dropped:
            request.error = ClosedError(f"the I/O engine was closed before {request.file.path} was transferred")
        return dropped
