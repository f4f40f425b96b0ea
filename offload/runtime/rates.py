"""Measures, in a tenth of a second, how fast the CPU multiplies by weights: what decides which processor does."""

from __future__ import annotations

import time
from collections.abc import Iterable
from statistics import median

import torch

from offload.kernels.chosen import Kernels
from offload.runtime.linears import multiply
from offload.runtime.packed import Packed
from offload.tiers.layout import Source
from offload.tiers.packing import pack
from offload.units import MIB

LEAST_NBYTES = 96 * MIB  # of matrices: more than caches hold
ROUNDS = 5


def cpu_rate(kernels: Kernels, matrices: Iterable[Source], rows: int) -> float:
    """Bytes of weights, as they lie in memory, that the CPU multiplies by in a second.

    Args:
        kernels: the CPU's.
        matrices: those in question; the one that takes the most bytes speaks for all.
        rows: of the activations.
    """
    source = max(matrices, key=lambda s: s.nbytes)
    count = -(-LEAST_NBYTES // max(1, source.nbytes))
    outputs, inputs = source.shape
    plain = torch.empty(outputs, inputs, dtype=source.dtype).normal_(std=0.02)
    weights = [_like(source, plain, kernels) for _ in range(min(count, 64))]
    x = torch.ones(rows, inputs, dtype=source.dtype)
    seconds = []
    with torch.no_grad():
        for _ in range(ROUNDS):
            began = time.perf_counter()
            for weight in weights:
                multiply(x, weight, None, kernels)
            seconds.append(time.perf_counter() - began)
    return len(weights) * source.nbytes / median(seconds)


def _like(source: Source, plain: torch.Tensor, kernels: Kernels) -> torch.Tensor:
    if source.form is None:
        return plain.clone()
    packed = pack(plain, source.form, kernels)
    return Packed(packed, kernels, source.shape, source.dtype, torch.device("cpu"))
