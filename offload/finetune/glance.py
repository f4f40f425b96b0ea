"""A second's look at a machine that nobody has probed: torch's product of the widest matrix, and the disk's rate."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from functools import lru_cache

import torch

from offload.io.rate import read_rate
from offload.profile import Lane, Profile
from offload.specs import ModelSpec

MOST_ROWS, MOST_OUTPUTS = 512, 4096  # of the product: what is larger takes in proportion
ROUNDS = 3
DISK_S = 0.3
NOTE = "a second's look at this machine's products and disk"


def glance(profile: Profile, spec: ModelSpec, rows: int, file: str) -> Profile:
    """The same machine with its CPU's and its disk's rates as they are seen now; one that was measured as it is.

    A desktop's rates, which stand in for a machine's otherwise, hide that the disk or the cores are slow, and plan
    neither for the one nor for the other. Writing is taken to be as fast as reading.

    Args:
        rows: of activations in a step.
        file: of the checkpoint, which is read.
    """
    if profile.source == "measured" or "cpu" not in profile.processors:
        return profile
    cpu, lane = profile.processors["cpu"], profile.lane("read")
    matrices = [t for u in spec.units for t in u.tensors if t.width and not t.is_table]
    inputs = max((t.width for t in matrices), default=1024)
    rates = {name: _flops(name, inputs, min(rows, MOST_ROWS)) / cpu.efficiency for name in {spec.dtype, "float32"}}
    rate = _disk_rate(os.path.realpath(file))
    copies = tuple(replace(r, bytes_per_s=r.bytes_per_s * rate / lane.bytes_per_s) for r in lane.rates)
    disk = Lane(rates=copies, sustained_bytes_per_s=rate, latency_s=lane.latency_s, shares=lane.shares)
    processors = {**profile.processors, "cpu": replace(cpu, flops=rates)}
    return replace(profile, processors=processors, lanes={**profile.lanes, "read": disk, "write": disk}, notes=(NOTE,))


@lru_cache(maxsize=8)  # once in a process: what is announced is what the run plans with
def _disk_rate(file: str) -> float:
    return read_rate(file, seconds=DISK_S)


@lru_cache(maxsize=8)
def _flops(name: str, inputs: int, rows: int) -> float:
    """Operations a second of a product with the widest of the model's matrices, or a part of it."""
    dtype: torch.dtype = getattr(torch, name)
    x, weight = torch.ones(rows, inputs, dtype=dtype), torch.ones(MOST_OUTPUTS, inputs, dtype=dtype)
    seconds = []
    with torch.no_grad():
        for _ in range(1 + ROUNDS):  # the first makes a kernel
            began = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            seconds.append(time.perf_counter() - began)
    return 2.0 * x.shape[0] * inputs * MOST_OUTPUTS / min(seconds[1:])
