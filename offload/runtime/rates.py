"""Measures, in a tenth of a second, how fast the CPU multiplies by weights: what decides which processor does."""

from __future__ import annotations

import time
from collections.abc import Iterable
from statistics import median

import torch

from offload.kernels.chosen import Kernels
from offload.kernels.formats.form import Form
from offload.runtime.linears import multiply
from offload.runtime.packed import Packed
from offload.tiers.layout import Source
from offload.tiers.packing import pack
from offload.units import MIB

LEAST_NBYTES = 96 * MIB  # of matrices: more than caches hold
PIECE_NBYTES = 32 * MIB  # of a matrix that is measured, at most: the budget counts nothing of this
MOST = 64  # matrices, where they are small
ROUNDS = 5


def cpu_rate(kernels: Kernels, matrices: Iterable[Source], rows: int) -> float:
    """Bytes of weights, as they lie in memory, that the CPU multiplies by in a second.

    Args:
        kernels: the CPU's.
        matrices: those in question; the one that takes the most bytes speaks for all.
        rows: of the activations.
    """
    source = max(matrices, key=lambda s: s.nbytes)
    inputs = source.shape[1]
    outputs = max(1, min(source.shape[0], PIECE_NBYTES // (inputs * source.dtype.itemsize)))  # a head may be a gigabyte
    form = source.form and source.form.with_outputs(outputs)
    nbytes = form.nbytes if form else outputs * inputs * source.dtype.itemsize
    plain = torch.empty(outputs, inputs, dtype=source.dtype).normal_(std=0.02)
    weights = [_like(plain, form, kernels) for _ in range(min(-(-LEAST_NBYTES // nbytes), MOST))]
    x = torch.ones(rows, inputs, dtype=source.dtype)
    seconds = []
    with torch.no_grad():
        for _ in range(ROUNDS):
            began = time.perf_counter()
            for weight in weights:
                multiply(x, weight, None, kernels)
            seconds.append(time.perf_counter() - began)
    return len(weights) * nbytes / median(seconds)


def _like(plain: torch.Tensor, form: Form | None, kernels: Kernels) -> torch.Tensor:
    if form is None:
        return plain.clone()
    return Packed(pack(plain, form, kernels), kernels, tuple(plain.shape), plain.dtype, torch.device("cpu"))
