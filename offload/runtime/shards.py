"""The lane of training state: reads shards ahead in the order of their updates, and writes them back behind them.

    lane's thread    lease a slot, read the next shard       as far ahead as the ring has slots
    model's thread   take it, update it in place, give it    the slot goes back when its write has ended

A shard that is kept in memory travels only when it is written for a commit.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from offload.io.buffers import Buffer, BufferPool, Interrupted, Lease
from offload.runtime.timeline import Timeline, now
from offload.tiers.statefile import StateFile


@dataclass(slots=True)
class Held:
    """A shard's state in memory, on loan between `take` and `give`."""

    name: str
    view: memoryview
    lease: Lease | None  # None for one that is kept


class ShardLane:
    """Takes and gives must follow `order`, round and round.

    Args:
        state: where shards are stored.
        order: their names in the order of their updates.
        nbytes: the size of each.
        slots: depth of the ring.
        timeline: receives spans and stalls.
    """

    def __init__(
        self, state: StateFile, order: Sequence[str], nbytes: dict[str, int], slots: int, timeline: Timeline
    ) -> None:
        self._state, self._order, self._nbytes, self._timeline = state, tuple(order), nbytes, timeline
        self._ring = BufferPool(slots, max(nbytes.values()))
        self._changed = threading.Condition()
        self._given = dict.fromkeys(self._order, 0)  # rounds that each shard has behind it
        self._arriving: deque[tuple[str, Lease, Future[int]]] = deque()  # bounded by the ring
        self._keeping: set[str] = set()
        self._kept: dict[str, Buffer] = {}
        self._dirty: set[str] = set()
        self._failure: BaseException | None = None
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="offload-state", daemon=True)

    @property
    def ring(self) -> BufferPool:
        return self._ring

    def start(self) -> None:
        """Lets the lane read. Every shard has been written once."""
        self._thread.start()

    def take(self, name: str) -> Held:
        """Waits for a shard; its bytes are those that were given last, or a CheckpointError says that they are not."""
        if name in self._kept:
            return Held(name, self._kept[name].view, None)
        start = now()
        with self._changed:
            self._changed.wait_for(lambda: self._arriving or self._failure is not None)
            if self._failure is not None:
                raise self._failure
            found, lease, future = self._arriving.popleft()
        assert found == name, f"{name} was taken where {found} was next"
        future.result()
        self._timeline.stall("compute:read", name, start, now())
        view = lease.view[: self._nbytes[name]]
        self._state.verify(name, view)
        return Held(name, view, lease)

    def give(self, held: Held, generation: int) -> None:
        """Takes a shard back: kept, or written and its slot free when that is done."""
        name, lease = held.name, held.lease
        if lease is None:
            self._dirty.add(name)
        elif name in self._keeping:
            buffer = Buffer(len(held.view))
            buffer.view[:] = held.view
            self._keeping.discard(name)
            self._kept[name] = buffer
            self._dirty.add(name)
            lease.release()
        else:
            start, nbytes = now(), len(held.view)
            future = self._state.write(name, held.view, generation)

            def done(_: Future[int]) -> None:
                self._timeline.add("write", name, start, now(), nbytes)
                lease.release()

            future.add_done_callback(done)
        with self._changed:
            self._given[name] += 1
            self._changed.notify_all()

    def fill(self, make: Callable[[str, memoryview], None], generation: int) -> None:
        """Writes every shard for the first time, before the start.

        Args:
            make: fills a shard's bytes.
        """
        for name in self._order:
            lease = self._ring.lease()
            view = lease.view[: self._nbytes[name]]
            make(name, view)
            self._state.write(name, view, generation).add_done_callback(lambda _, lease=lease: lease.release())

    def look(self, see: Callable[[str, memoryview], None]) -> None:
        """Reads every shard once and checks it, before the start.

        Args:
            see: gets a shard's bytes, for as long as it runs.
        """
        ahead: deque[tuple[str, Lease, Future[int]]] = deque()
        names = deque(self._order)
        while names or ahead:
            while names and (lease := self._ring.try_lease()) is not None:
                name = names.popleft()
                ahead.append((name, lease, self._state.read(name, lease.view)))
            name, lease, future = ahead.popleft()
            future.result()
            view = lease.view[: self._nbytes[name]]  # a shard's room may be larger
            self._state.verify(name, view)
            see(name, view)
            lease.release()

    def keep(self, name: str) -> None:
        """Keeps a shard in memory from its next update on."""
        self._keeping.add(name)

    @property
    def kept_nbytes(self) -> int:
        """Bytes of what is kept, and of what will be."""
        return sum(self._nbytes[name] for name in (*self._kept, *self._keeping))

    def write_kept(self, generation: int) -> None:
        """Writes what is kept and has changed since it was written, for a commit."""
        for name in [n for n in self._order if n in self._dirty]:
            self._state.write(name, self._kept[name].view, generation)
            self._dirty.discard(name)

    def close(self) -> None:
        """Stops reading, waits for what is in flight and frees the memory."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        self._ring.interrupt()
        if self._thread.is_alive():
            self._thread.join()
        for _, _, future in self._arriving:
            future.exception()
        self._state.drain()
        self._ring.close()
        for buffer in self._kept.values():
            buffer.close()

    def _run(self) -> None:
        try:
            turn = 0
            while True:
                for name in self._order:
                    self._read(name, turn)
                turn += 1
        except Interrupted:
            return
        except BaseException as error:
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _read(self, name: str, turn: int) -> None:
        """Reads a shard ahead, once its last update has been given; does nothing for one that is kept."""
        with self._changed:
            self._changed.wait_for(lambda: self._given[name] >= turn or self._is_stopping)
            if self._is_stopping:
                raise Interrupted("the lane is stopping")
            if name in self._kept:
                return
        lease = self._ring.lease()
        start, nbytes = now(), self._nbytes[name]
        try:
            future = self._state.read(name, lease.view)
        except BaseException:
            lease.release()
            raise
        future.add_done_callback(lambda _: self._timeline.add("read", name, start, now(), nbytes))
        with self._changed:
            self._arriving.append((name, lease, future))
            self._changed.notify_all()
