"""What software takes beside moving and computing: calls, hand-offs between threads, entering a unit."""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from torch import nn

from offload.io.buffers import Buffer
from offload.io.engine import Engine
from offload.kernels.chosen import Kernels
from offload.probes.linears import product
from offload.probes.resident import resident
from offload.probes.sampling import Meter
from offload.profile import Lane
from offload.runtime import apart, linears
from offload.runtime.apart import Apart, Crossing
from offload.tiers.emulated import EmulatedDevice
from offload.tiers.host import as_tensor
from offload.tiers.layout import CopyOp, Layout, assemble
from offload.units import MIB

UNITS = 64
TURNS = 200
UNUSUAL = (67, 83, 101, 139, 173)  # rows that nothing else is measured with
STAGED = 48  # pieces of a MiB: more than caches hold
ALONE, ALONE_NBYTES = 13, 48 * MIB  # reads, and bytes of each: a slot of what streams without prefetching


def launch_s(meter: Meter) -> float:
    """A product that is too small to take any time of its own."""
    with torch.no_grad():
        runs = product([torch.ones(64, 64, dtype=torch.bfloat16)], 1, Kernels("cpu", exact=False))
        return meter.time(*runs).seconds


def first_s(meter: Meter, *, exact: bool) -> float:
    """What the first product with a number of rows takes beyond those that follow: libraries make a kernel for it."""
    weight, kernels = torch.full((512, 512), 0.01, dtype=torch.bfloat16), Kernels("cpu", exact=exact)
    beyond = []
    with torch.no_grad():
        for rows in UNUSUAL:
            (run,) = product([weight], rows, kernels)
            began = meter.now()
            run()
            first = meter.now() - began
            beyond.append(first - meter.time(run).seconds)
    return max(1e-9, median(beyond))


def assemble_s(meter: Meter) -> float:
    """What copying a MiB to its place takes, of a tensor that is stored in pieces."""
    pieces = (CopyOp(k * MIB, torch.bfloat16, MIB // 2, k * MIB, torch.bfloat16) for k in range(STAGED))
    layout = Layout(STAGED * MIB, STAGED * MIB, (), tuple(pieces), {})
    final, staging = Buffer(STAGED * MIB), Buffer(STAGED * MIB)
    seconds = meter.time(lambda: assemble(layout, as_tensor(final.view), as_tensor(staging.view))).seconds
    final.close()
    staging.close()
    return max(1e-9, seconds / STAGED)


def sleep_s(meter: Meter) -> float:
    """The shortest sleep there is."""
    return meter.time(functools.partial(time.sleep, 1e-6)).seconds


def handoff_s(meter: Meter) -> float:
    """From one thread to another that waits on a condition."""
    ball = _Ball()
    other = threading.Thread(target=ball.play, args=(1,), daemon=True)
    other.start()
    began = meter.now()
    ball.play(0)
    other.join()
    return max(1e-9, (meter.now() - began) / (2 * TURNS))


class _Ball:
    """Goes to and fro between two threads."""

    def __init__(self) -> None:
        self._changed, self._turn = threading.Condition(), 0

    def play(self, mine: int) -> None:
        for _ in range(TURNS):
            with self._changed:
                while self._turn % 2 != mine:
                    self._changed.wait()
                self._turn += 1
                self._changed.notify_all()


def read_submit_s(path: Path, fd: int | None, meter: Meter) -> float:
    """Handing a read to the engine, as the calling thread sees it."""
    buffer = Buffer(4096)
    with Engine(threads=8) as engine:
        file = engine.open(path, fd=None if fd is None else os.dup(fd))
        seconds = []
        for _ in range(50):
            began = meter.now()
            future = engine.read(file, 0, buffer.view, need=min(4096, file.nbytes))
            seconds.append(meter.now() - began)
            future.result()
    buffer.close()
    return max(1e-9, median(seconds))


def read_alone_s(path: Path, fd: int | None, lane: Lane, meter: Meter) -> float:
    """What a slot's read takes beyond its part of a steady stream, where the disk waits for it: requests begin
    one after the other, their threads wake up, and the last block is alone.
    """
    seconds = []
    with Engine(threads=8) as engine:
        file = engine.open(path, fd=None if fd is None else os.dup(fd))
        nbytes = min(ALONE_NBYTES, file.nbytes // file.block_alignment * file.block_alignment)
        places = max(1, file.nbytes // max(1, nbytes))
        buffer = Buffer(nbytes)
        for k in range(ALONE if nbytes else 0):
            began = meter.now()
            engine.read(file, k % places * nbytes, buffer.view).result()
            seconds.append(meter.now() - began)
        buffer.close()
    return max(1e-9, median(seconds[1:]) - nbytes / lane.bytes_per_s) if seconds else 1e-9


class _Nothing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(16), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class _Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Nothing() for _ in range(UNITS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def unit_s(meter: Meter) -> float:
    """Entering and leaving a unit whose weights are there: what offload adds to a block."""
    model, x = _Blocks(), torch.zeros(1)
    with torch.no_grad():
        plain = meter.time(*_times(model, x)).seconds
        with resident(model):
            hooked = meter.time(*_times(model, x)).seconds
    return max(1e-9, (hooked - plain) / UNITS)


def apart_s(meter: Meter) -> float:
    """What a product in two places takes beyond both its products: views, a result, and its way across the link."""
    kernels = Kernels("cpu", exact=False)
    device = EmulatedDevice(0)
    here, there = (torch.ones(64, 64, dtype=torch.bfloat16) for _ in range(2))
    x = torch.ones(1, 64, dtype=torch.bfloat16)
    both = Apart(here, there, Crossing(device, kernels))
    with torch.no_grad():
        one = meter.time(functools.partial(linears.multiply, x, here, None, kernels)).seconds
        two = meter.time(lambda: apart.product(x.clone(), both, None, kernels, linears.multiply)).seconds
    return max(1e-9, two - 2 * one)


def _times(model: nn.Module, x: torch.Tensor) -> Sequence[functools.partial[torch.Tensor]]:
    return [functools.partial(model, x)]
