"""io_uring without a library: raw system calls through ctypes, rings in mapped memory, one thread that reaps."""

from __future__ import annotations

import ctypes
import errno
import itertools
import logging
import mmap
import os
import platform
import struct
import threading
import time
from collections.abc import Sequence
from functools import cache

from offload.io.backends.base import MOST_PARTS, Block
from offload.io.osfiles import OsFiles

_log = logging.getLogger("offload.io")

_SETUP, _ENTER = 425, 426  # the numbers of the two system calls, the same on every architecture
_GETEVENTS = 1
_FEATURES = 1 << 0 | 1 << 3  # one mapping for both rings; kernel 5.6, which brought plain READ and WRITE
_RING_OFFSET, _ENTRIES_OFFSET = 0, 0x10000000
_NOP, _READV, _WRITEV, _READ, _WRITE = 0, 1, 2, 22, 23
_ENTRY = struct.Struct("<BBHiQQIIQ24x")  # opcode, flags, ioprio, fd, offset, address, length, rw flags, user data
_COMPLETION = struct.Struct("<QiI")  # user data, result, flags
_PAUSE_S = 0.001  # between looks at the ring where the kernel will not wait for us
_STOP = 0  # the user data that ends the reaper; blocks count from 1


def probe() -> str | None:
    """None, or why io_uring cannot be used."""
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "AMD64"):
        # Python has no memory barriers; the rings are safe without them only where stores stay in order.
        return f"io_uring is used on Linux and x86-64 only, this is {platform.system()} on {platform.machine()}"
    try:
        fd, parameters = _setup(4)
    except OSError as error:
        return f"the kernel refuses io_uring ({error.strerror})"
    os.close(fd)
    features = struct.unpack_from("<I", parameters, 20)[0]
    return None if features & _FEATURES == _FEATURES else "the kernel's io_uring is older than Linux 5.6"


def create(threads: int) -> UringBackend:
    """A backend with that many reads in flight and half as many writes."""
    return UringBackend(threads)


class UringBackend:
    """Blocks go straight to the kernel; no thread per block. The reaper runs every completion.

    The rings hold more entries than the engine ever starts, so neither can overflow.
    """

    name = "uring"

    def __init__(self, threads: int) -> None:
        self.files = OsFiles()
        self.read_depth, self.write_depth = threads, max(1, threads // 2)
        self._fd, parameters = _setup(self.read_depth + self.write_depth + 1)
        try:
            self._map(parameters)
        except BaseException:
            os.close(self._fd)
            raise
        self._lock = threading.Lock()  # one submitter at a time
        self._started: dict[int, tuple[Block, object]] = {}  # and what the kernel reads of it besides
        self._numbers = itertools.count(1)
        self._reaper: threading.Thread | None = None
        self._is_closed = False

    def _map(self, parameters: bytes) -> None:
        """Maps the rings into memory, where the kernel says they are."""
        entries, completions = struct.unpack_from("<II", parameters, 0)
        head, tail, mask, _, _, _, array = struct.unpack_from("<7I", parameters, 40)
        self._sq_head, self._sq_tail, self._sq_array = head // 4, tail // 4, array // 4  # in 32-bit words
        head, tail, cq_mask, _, _, cqes = struct.unpack_from("<6I", parameters, 80)
        self._cq_head, self._cq_tail, self._cqes = head // 4, tail // 4, cqes
        length = max(array + 4 * entries, cqes + _COMPLETION.size * completions)
        self._ring = mmap.mmap(self._fd, length, flags=mmap.MAP_SHARED, offset=_RING_OFFSET)
        self._entries = mmap.mmap(self._fd, 64 * entries, flags=mmap.MAP_SHARED, offset=_ENTRIES_OFFSET)
        self._words = memoryview(self._ring)[: length // 4 * 4].cast("I")
        self._sq_mask, self._cq_mask = self._words[mask // 4], self._words[cq_mask // 4]

    def start(self, blocks: Sequence[Block]) -> None:
        """Submit all blocks with one system call."""
        refused: list[tuple[int, OSError]] = []
        with self._lock:
            if self._reaper is None:
                self._reaper = threading.Thread(target=self._reap, name="offload-uring", daemon=True)
                self._reaper.start()
            numbers = []
            for block in blocks:
                number = next(self._numbers)
                opcode, address, count, kept = _order(block)
                self._started[number] = block, kept
                numbers.append(number)
                self._fill(len(numbers) - 1, opcode, block.fd, block.offset, address, count, number)
            done, error = self._submit(len(numbers))
            if error is not None:
                refused = [(number, error) for number in numbers[done:]]
        for number, failure in refused:
            self._started.pop(number)[0].complete(failure)

    def close(self) -> None:
        """End the reaper, join it, and unmap the rings."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            if self._reaper is not None:
                self._fill(0, _NOP, -1, 0, 0, 0, _STOP)
                _, error = self._submit(1)
                if error is not None:  # the daemon thread keeps the rings; nothing else can wake it
                    _log.error("io_uring could not be closed: %s", error)
                    return
        if self._reaper is not None and self._reaper is not threading.current_thread():
            self._reaper.join()
        self._words.release()
        self._ring.close()
        self._entries.close()
        os.close(self._fd)

    def _fill(self, ahead: int, opcode: int, fd: int, offset: int, address: int, nbytes: int, number: int) -> None:
        index = self._words[self._sq_tail] + ahead & self._sq_mask
        _ENTRY.pack_into(self._entries, 64 * index, opcode, 0, 0, fd, offset, address, nbytes, 0, number)
        self._words[self._sq_array + index] = index

    def _submit(self, count: int) -> tuple[int, OSError | None]:
        """Publish `count` filled entries; returns how many the kernel took and why not all."""
        words = self._words
        words[self._sq_tail] = words[self._sq_tail] + count & 0xFFFFFFFF
        done = 0
        while done < count:
            taken = _enter(self._fd, count - done, 0, 0)
            if taken >= 0:
                done += taken
                if taken:
                    continue
                taken = -errno.EAGAIN
            if taken != -errno.EINTR:
                # The kernel reads entries only inside that call, so what it left can be taken back.
                words[self._sq_tail] = words[self._sq_head]
                return done, OSError(-taken, os.strerror(-taken))
        return done, None

    def _reap(self) -> None:
        words, is_told = self._words, False
        while True:
            waited = _enter(self._fd, 0, 1, _GETEVENTS)
            if waited < 0 and waited != -errno.EINTR:
                # Blocks are in flight into memory that is lent, and complete in the ring all the same: we look there.
                if not is_told:
                    _log.warning("io_uring cannot wait (%s); looking every millisecond", os.strerror(-waited))
                    is_told = True
                time.sleep(_PAUSE_S)
            while (head := words[self._cq_head]) != words[self._cq_tail]:
                number, outcome, _ = _COMPLETION.unpack_from(self._ring, self._cqes + 16 * (head & self._cq_mask))
                words[self._cq_head] = head + 1 & 0xFFFFFFFF
                if number == _STOP:
                    return
                block, _ = self._started.pop(number)
                try:
                    block.complete(outcome if outcome >= 0 else OSError(-outcome, os.strerror(-outcome)))
                except BaseException:
                    _log.exception("the io_uring thread survived an error in the completion of a block")
                del block


class _Vector(ctypes.Structure):
    """struct iovec."""

    _fields_ = (("base", ctypes.c_void_p), ("nbytes", ctypes.c_size_t))


def _order(block: Block) -> tuple[int, int, int, object]:
    """What the kernel shall do: opcode, address, and a count of bytes or of parts, which then lie in what is kept."""
    if len(block.parts) == 1:
        (part,) = block.parts
        return _WRITE if block.is_write else _READ, part.address, part.view.nbytes, None
    parts = block.parts[:MOST_PARTS]
    vector = (_Vector * len(parts))(*[_Vector(part.address, part.view.nbytes) for part in parts])
    return _WRITEV if block.is_write else _READV, ctypes.addressof(vector), len(vector), vector


@cache
def _syscall() -> ctypes._NamedFuncPointer:
    function = ctypes.CDLL(None, use_errno=True).syscall
    function.restype = ctypes.c_long
    return function


def _setup(entries: int) -> tuple[int, bytes]:
    """A ring's descriptor and the filled struct io_uring_params. Raises OSError."""
    parameters = ctypes.create_string_buffer(120)
    fd = int(_syscall()(ctypes.c_long(_SETUP), ctypes.c_uint(entries), parameters))
    if fd < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    os.set_inheritable(fd, False)
    return fd, parameters.raw


def _enter(fd: int, submit: int, wait: int, flags: int) -> int:
    """io_uring_enter: entries taken, or a negative errno."""
    none = ctypes.c_void_p(None)
    result = int(
        _syscall()(
            ctypes.c_long(_ENTER), ctypes.c_uint(fd), ctypes.c_uint(submit), ctypes.c_uint(wait), ctypes.c_uint(flags),
            none, ctypes.c_size_t(0),
        )
    )  # fmt: skip
    return result if result >= 0 else -ctypes.get_errno()
