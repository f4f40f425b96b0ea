"""Measures, in a tenth of a second, how fast the CPU multiplies by weights: what decides which processor does, and what
the memory of just this process is worth."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterable
from statistics import median

import torch

from offload.kernels.chosen import Kernels
from offload.kernels.formats.form import Form
from offload.planner.placement import Tier
from offload.runtime.linears import multiply
from offload.runtime.packed import Packed
from offload.specs import Products
from offload.tiers.layout import Source
from offload.tiers.packing import pack
from offload.tiers.store import Store
from offload.units import KIB, MIB

LEAST_NBYTES = 96 * MIB  # of matrices: more than caches hold
MOST_NBYTES = 512 * MIB  # of matrices that lie in memory anyway
PIECE_NBYTES = 32 * MIB  # of a matrix that is measured, at most: the budget counts nothing of this
MOST = 64  # matrices, where they are small
ROUNDS = 5
EXPERTS = 3  # dimensions of a stack of experts' matrices
LEAST_EXPERT = 64 * KIB


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


def resident_products(store: Store, kernels: Kernels, linears: Collection[str]) -> Products | None:
    """Multiplies by what lies in memory, where it lies, experts one by one; None where that is packed, or too little to
    leave the caches.

    The same memory is read at 20 to 40 GB/s, depending on which pages a process was given and on who else is there: it
    is known only in the process itself.
    """
    wanted = [
        (name, source)
        for name, source in store.sources.items()
        if ((name in linears and len(source.shape) == 2) or _has_experts(source))
        and store.placement.home[name] is not Tier.DISK
        and source.form is None
    ]
    dtypes = Counter(source.dtype for _, source in wanted)
    if not dtypes or not (dtype := dtypes.most_common(1)[0][0]).is_floating_point:
        return None
    weights, total = [], 0
    for name, source in wanted:
        if source.dtype is dtype and total + source.nbytes <= MOST_NBYTES:
            kept = store.kept(name)
            weights += kept.unbind() if kept.dim() == EXPERTS else [kept]
            total += source.nbytes
    if total < LEAST_NBYTES:
        return None
    rows = {w.shape[1]: torch.ones(1, w.shape[1], dtype=dtype) for w in weights}
    seconds = []
    with torch.no_grad():
        for _ in range(ROUNDS):
            began = time.perf_counter()
            for weight in weights:
                multiply(rows[weight.shape[1]], weight, None, kernels)
            seconds.append(time.perf_counter() - began)
    shapes = tuple((int(w.shape[0]), int(w.shape[1])) for w in weights)
    return Products(shapes=shapes, dtype=str(dtype).removeprefix("torch."), seconds=median(seconds))


def _has_experts(source: Source) -> bool:
    """A stack with a matrix for each expert; convolutions have three dimensions, too, but next to no bytes."""
    return len(source.shape) == EXPERTS and source.nbytes >= LEAST_EXPERT * source.shape[0]


def _like(plain: torch.Tensor, form: Form | None, kernels: Kernels) -> torch.Tensor:
    if form is None:
        return plain.clone()
    return Packed(pack(plain, form, kernels), kernels, tuple(plain.shape), plain.dtype, torch.device("cpu"))
