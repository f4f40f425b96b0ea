"""How fast a file can be read in sequence, measured with the engine that will read it later."""

from __future__ import annotations

import os
import time
from collections import deque
from concurrent.futures import Future

from offload.errors import UsageError
from offload.io.buffers import Buffer
from offload.io.engine import Engine
from offload.io.extents import ALIGNMENT
from offload.units import MIB


def read_rate(
    path: str | os.PathLike[str], *, seconds: float = 0.5, buffer: Buffer | None = None, backend: str = "threads",
    threads: int = 8, block_nbytes: int = 8 * MIB,
) -> float:  # fmt: skip
    """Bytes per second of sequential O_DIRECT reads of an existing file, from its start and again when it ends.

    The first pass over the memory, which touches it, is not counted. Where direct reads are refused the figure is that
    of the page cache.

    Args:
        path: at least one byte; a file of a few hundred MB tells most.
        seconds: about how long the counted part takes; a block in flight is waited for.
        buffer: memory to read into, lent for the call, at least 4096 bytes; by default one block per thread.
        backend: a name in BACKENDS.
        threads: reads in flight.
        block_nbytes: bytes of one read, a multiple of 4096.

    Raises:
        StorageError: the file cannot be read.
        UsageError: the file is empty, or the buffer holds less than one aligned page.
    """
    memory = buffer or Buffer(threads * block_nbytes)
    try:
        with Engine(backend, threads=threads, block_nbytes=block_nbytes) as engine:
            file = engine.open(path)
            if file.nbytes == 0:
                raise UsageError(f"{path} is empty; a read rate needs a file with bytes in it")
            unit = max(ALIGNMENT, file.alignment)
            begin = -memory.address % unit
            size = min(block_nbytes, (memory.nbytes - begin) // threads // unit * unit, -(-file.nbytes // unit) * unit)
            if size < unit:
                raise UsageError(f"a buffer of {memory.nbytes:,} bytes holds no {threads} reads of {unit} bytes")
            slots = [memory.view[begin + i * size : begin + (i + 1) * size] for i in range(threads)]
            position = 0

            def submit(slot: int) -> tuple[int, Future[int]]:
                nonlocal position
                at, position = position, position + size
                if position >= file.nbytes:
                    position = 0
                return slot, engine.read(file, at, slots[slot], need=min(size, file.nbytes - at))

            flying = deque(submit(slot) for slot in range(threads))
            for _ in range(threads):  # the pass that touches the memory
                slot, future = flying.popleft()
                future.result()
                flying.append(submit(slot))
            began, counted = time.perf_counter(), 0
            while not counted or time.perf_counter() - began < seconds:
                slot, future = flying.popleft()
                counted += future.result()
                flying.append(submit(slot))
            passed = time.perf_counter() - began
            for _, future in flying:
                future.result()
            return counted / passed
    finally:
        if buffer is None:
            memory.close()
