"""How fast a GPU's link is, by size and direction, from memory that is pinned as the runtime pins it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from offload.io.buffers import Buffer
from offload.probes.interference import Activity, repeat
from offload.probes.sampling import Meter, Now
from offload.profile import CopyRate
from offload.tiers.cuda import CudaDevice
from offload.tiers.host import as_tensor

DIRECTIONS = ("h2d", "d2h")


def rates(device: str, sizes: Sequence[int], meter: Meter) -> Iterator[tuple[str, CopyRate]]:
    """(lane, figure) for each direction and size; copies are queued one behind the other and timed by events."""
    for nbytes in sizes:
        with _pair(device, nbytes) as (host, there):
            for lane in DIRECTIONS:
                copy = _copy(lane, host, there)
                sample = meter.time(*[copy] * max(2, min(64, (256 << 20) // nbytes)))
                yield lane, CopyRate(nbytes, 1, sample.rate(nbytes), sample.spread)


@contextmanager
def activities(device: str, nbytes: int, now: Now) -> Iterator[list[Activity]]:
    """Copies in both directions, each on a stream of its own, for the interference matrix."""
    with _pair(device, nbytes) as first, _pair(device, nbytes) as second:
        found = []
        for lane, pair in zip(DIRECTIONS, (first, second), strict=True):
            stream = torch.cuda.Stream(device)
            found.append(Activity(name=lane, loop=repeat([_on(stream, _copy(lane, *pair))], now, stream.synchronize)))
        yield found


@contextmanager
def _pair(device: str, nbytes: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pinned memory and as much on the device."""
    cuda, buffer = CudaDevice(device), Buffer(nbytes)
    try:
        host = as_tensor(buffer.view).fill_(1)
        cuda.register(buffer)
        yield host, cuda.allocate(nbytes)
    finally:
        cuda.close()
        buffer.close()


def _copy(lane: str, host: torch.Tensor, there: torch.Tensor) -> Callable[[], object]:
    if lane == "h2d":
        return lambda: there.copy_(host, non_blocking=True)
    return lambda: host.copy_(there, non_blocking=True)


def _on(stream: torch.cuda.Stream, run: Callable[[], object]) -> Callable[[], None]:
    def queued() -> None:
        with torch.cuda.stream(stream):
            run()

    return queued
