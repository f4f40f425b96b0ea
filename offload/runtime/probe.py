"""Measures what predictions rest on: for now the disk's read rate, on the very files that will be streamed."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future

from offload.io.buffers import BufferPool, Lease
from offload.planner.placement import Tier
from offload.runtime.timeline import now
from offload.tiers.store import Store
from offload.units import MIB

CHUNK = 16 * MIB
CHUNKS = 4


def disk_rate(store: Store, seconds: float = 0.3) -> float | None:
    """Bytes per second that the disk gives to sequential reads of the weights; None when nothing lives on disk.

    Reads the file that most streams from, for about so long, in chunks as large as a block's tensors. The first round
    of chunks, which touches the memory, is not counted: fresh memory can be slower than the disk.
    """
    sizes: dict[str, int] = {}
    for name, home in store.placement.home.items():
        if home is Tier.DISK:
            for piece in store.sources[name].pieces:
                sizes[piece.extent.path] = sizes.get(piece.extent.path, 0) + piece.extent.nbytes
    if not sizes:
        return None
    file = store.open(max(sizes, key=lambda path: sizes[path]))
    nbytes = min(CHUNK, file.nbytes // file.block_alignment * file.block_alignment)
    if not nbytes:
        return None
    places = range(0, file.nbytes - nbytes + 1, nbytes)
    pool = BufferPool(CHUNKS, nbytes)
    flights: deque[tuple[Lease, Future[int]]] = deque()
    moved, began, n = 0, now(), 0
    while n <= CHUNKS or now() - began < seconds or flights:
        if len(flights) == CHUNKS or (n > CHUNKS and now() - began >= seconds):
            lease, future = flights.popleft()
            moved += future.result()
            lease.release()
        if n <= CHUNKS or now() - began < seconds:
            if n == CHUNKS:  # the memory is warm: start the clock with an empty disk queue
                while flights:
                    lease, future = flights.popleft()
                    future.result()
                    lease.release()
                moved, began = 0, now()
            lease = pool.lease()
            view = lease.view[:nbytes]
            flights.append((lease, store.engine.read(file, places[n % len(places)], view)))
            n += 1
    rate = moved / (now() - began)
    pool.close()
    return rate
