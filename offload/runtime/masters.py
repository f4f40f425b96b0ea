"""Weights out of the masters that optimizer state begins with: read in float32, rounded on their way to the cell.

A thread of its own rounds, while the disk brings the next shard and the model's thread computes. It works on pieces
that torch does not divide among threads: another team of them would fight with the model's for the cores.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from queue import SimpleQueue

import torch

from offload.io.buffers import BufferPool, Lease
from offload.io.extents import ALIGNMENT
from offload.tiers.cells import Shard
from offload.tiers.host import as_tensor
from offload.tiers.statefile import StateFile

STAGES = 6  # shards on their way
PIECE = 1 << 15  # elements: torch's grain, up to which it uses one thread

_Piece = tuple[Shard, torch.Tensor, memoryview, Lease | None, Future[int] | None]


class Masters:
    """Reads the weights of cells. One load at a time may be started, from any thread.

    Args:
        state: where shards are stored.
        kept: shards whose state is in memory, which may change between loads.
        count: elements of a shard at most.
    """

    def __init__(self, state: StateFile, kept: Mapping[str, memoryview], count: int) -> None:
        self._state, self._kept = state, kept
        self._stages = BufferPool(STAGES, 4 * count)
        self._stages.buffer.touch()
        self._queue: SimpleQueue[_Piece | Future[int] | None] = SimpleQueue()  # bounded by the stages
        self._thread = threading.Thread(target=self._run, name="offload-masters", daemon=True)
        self._thread.start()

    @property
    def nbytes(self) -> int:
        """Of the memory that it works in."""
        return self._stages.buffer.nbytes

    def load(self, shards: Sequence[Shard], cell: torch.Tensor) -> Future[int]:
        """Starts filling a cell (its bytes) with the weights of its shards; the future gives the bytes that were read.

        Raises:
            Interrupted: see `interrupt`; nothing is written to the cell any more.
        """
        done: Future[int] = Future()
        moved = 0
        try:
            for shard in shards:
                if shard.name in self._kept:
                    self._queue.put((shard, cell, self._kept[shard.name], None, None))
                    continue
                lease = self._stages.lease()
                nbytes = -(-4 * shard.count // ALIGNMENT) * ALIGNMENT
                try:
                    future = self._state.read(shard.name, lease.view, nbytes)
                except BaseException:
                    lease.release()
                    raise
                moved += nbytes
                self._queue.put((shard, cell, lease.view, lease, future))
        except BaseException:
            self._queue.put(done)
            done.exception()  # what was started writes to the cell
            raise
        done.nbytes = moved  # type: ignore[attr-defined]
        self._queue.put(done)
        return done

    def interrupt(self) -> None:
        """Ends a wait for room in `load`."""
        self._stages.interrupt()

    def resume(self) -> None:
        """After `interrupt`."""
        self._stages.resume()

    def close(self) -> None:
        """Waits for what is on its way."""
        self._stages.interrupt()
        self._queue.put(None)
        self._thread.join()
        self._stages.close()

    def _run(self) -> None:
        failure: BaseException | None = None
        while (item := self._queue.get()) is not None:
            if not isinstance(item, Future):
                failure = _round(*item) or failure
            elif failure is not None:
                item.set_exception(failure)
                failure = None
            else:
                item.set_result(getattr(item, "nbytes", 0))
            item = None  # a tensor that is held while the thread waits would hold the memory of a whole ring


def _round(
    shard: Shard, cell: torch.Tensor, view: memoryview, lease: Lease | None, future: Future[int] | None
) -> BaseException | None:
    """One shard's masters into its cell; returns what went wrong."""
    try:
        if future is not None:
            future.result()
        masters = as_tensor(view[: 4 * shard.count]).view(torch.float32)
        weights = shard.of(cell).view(-1)
        for start in range(0, shard.count, PIECE):
            weights[start : start + PIECE].copy_(masters[start : start + PIECE])
    except BaseException as error:
        return error
    finally:
        if lease is not None:
            lease.release()
    return None
