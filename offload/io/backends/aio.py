"""The portable backend: aiofiles on one event loop, for systems without positioned reads."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import importlib.util
import logging
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from offload.io.backends.base import Block
from offload.io.osfiles import OsFiles

_log = logging.getLogger("offload.io")


def probe() -> str | None:
    """None, or why this backend cannot be used."""
    return None if importlib.util.find_spec("aiofiles") else "the package aiofiles is not installed"


def create(threads: int) -> AiofilesBackend:
    """A backend with that many reads in flight and half as many writes."""
    return AiofilesBackend(threads)


class HandleFiles(OsFiles):
    """Descriptors that each carry a pool of aiofiles handles, unbuffered and with positions of their own.

    A transfer needs a handle to itself, so a pool grows to the transfers in flight on its file; it ends with the
    descriptor. A file without a path can be had again only where there is /proc.
    """

    def __init__(self, executor: ThreadPoolExecutor) -> None:
        self._executor = executor
        self._lock = threading.Lock()
        self._idle: dict[int, list[Any]] = {}  # descriptor -> handles that nobody uses
        self._paths: dict[int, str] = {}

    def open(self, path: str, *, is_writable: bool) -> int:
        """As OsFiles, with an empty pool."""
        return self._carry(super().open(path, is_writable=is_writable), path)

    def adopt(self, fd: int) -> int:
        """As OsFiles, with an empty pool."""
        return self._carry(super().adopt(fd), "")

    def open_direct(self, fd: int, path: str, *, is_writable: bool) -> int:
        """As OsFiles, with an empty pool."""
        return self._carry(super().open_direct(fd, path, is_writable=is_writable), path)

    def close(self, fd: int) -> None:
        """Close the descriptor and its handles."""
        with self._lock:
            handles = self._idle.pop(fd, [])
            self._paths.pop(fd, None)
        super().close(fd)
        for handle in handles:
            os.close(handle.fileno())  # unbuffered, so nothing to flush; here is no event loop to wait for

    async def lend(self, fd: int) -> Any:
        """An idle handle of the descriptor's file, or a new one. Raises OSError."""
        import aiofiles

        with self._lock:
            idle, path = self._idle[fd], self._paths[fd]
            if idle:
                return idle.pop()
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        kept = flags & (os.O_ACCMODE | getattr(os, "O_DIRECT", 0))
        loop = asyncio.get_running_loop()
        own = await loop.run_in_executor(self._executor, self.reopen, fd, path, kept)
        mode: Any = "r+b" if flags & os.O_ACCMODE == os.O_RDWR else "rb"
        try:
            return await aiofiles.open(own, mode, buffering=0, closefd=False, executor=self._executor)
        except BaseException:
            os.close(own)
            raise

    def give_back(self, fd: int, handle: Any) -> None:
        """Return a handle to its pool."""
        with self._lock:
            self._idle[fd].append(handle)

    def _carry(self, fd: int, path: str) -> int:
        with self._lock:
            self._idle[fd], self._paths[fd] = [], path
        return fd


class AiofilesBackend:
    """A task per block; the loop's thread runs every completion, the executor's threads wait for the disk."""

    name = "aiofiles"

    def __init__(self, threads: int) -> None:
        self.read_depth, self.write_depth = threads, max(1, threads // 2)
        depth = self.read_depth + self.write_depth
        self._executor = ThreadPoolExecutor(depth, thread_name_prefix="offload-aiofiles")
        self.files = HandleFiles(self._executor)
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()  # bounded by the depths; a task without a reference may vanish
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._is_closed = False

    def start(self, blocks: Sequence[Block]) -> None:
        """Make a task of each block."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop.run_forever, name="offload-aiofiles", daemon=True)
                self._thread.start()
        self._loop.call_soon_threadsafe(self._spawn, tuple(blocks))

    def close(self) -> None:
        """Stop the loop and join every thread."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        if self._thread is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        self._loop.close()
        self._executor.shutdown()

    def _spawn(self, blocks: tuple[Block, ...]) -> None:
        for block in blocks:
            task = self._loop.create_task(self._run(block))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _run(self, block: Block) -> None:
        result: int | OSError
        try:
            result = await self._transfer(block)
        except OSError as error:
            result = error
        except Exception as error:
            result = OSError(errno.EIO, f"aiofiles failed: {error!r}")
        try:
            block.complete(result)
        except Exception:
            _log.exception("the aiofiles thread survived an error in the completion of a block")

    async def _transfer(self, block: Block) -> int:
        handle = await self.files.lend(block.fd)
        try:
            os.lseek(handle.fileno(), block.offset, os.SEEK_SET)  # waits for nothing, so it needs no thread
            move, moved = handle.write if block.is_write else handle.readinto, 0
            for part in block.parts:
                count: int | None = await move(part.view)
                if count is None and not moved:  # how raw files say EAGAIN
                    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
                moved += count or 0
                if count != part.view.nbytes:
                    break
        finally:
            self.files.give_back(block.fd, handle)
        return moved
