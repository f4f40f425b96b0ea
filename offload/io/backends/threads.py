"""The default backend: preadv and pwritev in threads, which release the interpreter lock while the disk works."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from queue import SimpleQueue

from offload.io.backends.base import MOST_PARTS, Block
from offload.io.osfiles import OsFiles

_log = logging.getLogger("offload.io")


def probe() -> str | None:
    """None, or why this backend cannot be used."""
    return None if hasattr(os, "preadv") else "this Python has no os.preadv"


def create(threads: int) -> ThreadsBackend:
    """A backend with that many reads in flight and half as many writes."""
    return ThreadsBackend(threads)


class ThreadsBackend:
    """One thread per block in flight; writers are threads of their own, so no write ever holds up a read.

    The queues are bounded by the engine, which starts no more blocks than there are threads. Threads begin with the
    first block of their direction, are daemons (a hung disk must not keep the process), and are joined by close().
    """

    name = "threads"

    def __init__(self, threads: int) -> None:
        self.files = OsFiles()
        self.read_depth, self.write_depth = threads, max(1, threads // 2)
        self._reads: SimpleQueue[Block | None] = SimpleQueue()
        self._writes: SimpleQueue[Block | None] = SimpleQueue()
        self._readers: list[threading.Thread] = []
        self._writers: list[threading.Thread] = []
        self._lock = threading.Lock()

    def start(self, blocks: Sequence[Block]) -> None:
        """Queue the blocks; a free thread takes each."""
        for block in blocks:
            if block.is_write:
                if not self._writers:
                    self._spawn(self._writers, self.write_depth, self._writes, "write")
                self._writes.put(block)
            else:
                if not self._readers:
                    self._spawn(self._readers, self.read_depth, self._reads, "read")
                self._reads.put(block)

    def close(self) -> None:
        """Let every thread end after its block, and join it."""
        with self._lock:
            for queue, threads in ((self._reads, self._readers), (self._writes, self._writers)):
                for _ in threads:
                    queue.put(None)
            ending = self._readers + self._writers
            self._readers, self._writers = [], []
        for thread in ending:
            if thread is not threading.current_thread():  # a callback of a future may close the engine
                thread.join()

    def _spawn(self, threads: list[threading.Thread], count: int, queue: SimpleQueue[Block | None], verb: str) -> None:
        with self._lock:
            if threads:
                return  # another thread was first
            for number in range(count):
                thread = threading.Thread(target=_work, args=(queue,), name=f"offload-{verb}-{number}", daemon=True)
                thread.start()
                threads.append(thread)


def _work(queue: SimpleQueue[Block | None]) -> None:
    while (block := queue.get()) is not None:
        result: int | OSError
        try:
            transfer = os.pwritev if block.is_write else os.preadv
            result = transfer(block.fd, [part.view for part in block.parts[:MOST_PARTS]], block.offset)
        except OSError as error:
            result = error
        try:
            block.complete(result)
        except BaseException:
            _log.exception("an I/O thread survived an error in the completion of a block")
        del block, result  # an idle thread must not keep a caller's memory alive
