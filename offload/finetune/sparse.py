"""Which weights Sparse MeZO leaves alone (Liu et al., 2024, arXiv:2402.15751): the largest ones of each parameter.

Noise hurts most where weights are large, so that only those up to a threshold move. The thresholds follow from the
weights of the checkpoint, once; which weights are below them is looked at in every step.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import floor, prod

import torch

from offload.io.engine import Engine
from offload.tiers import transit
from offload.tiers.layout import Source

KINDS = 1 << 15  # magnitudes of bfloat16, or of the upper half of float32
AT_ONCE = 1 << 20


def thresholds(sources: Mapping[str, Source], sparsity: float, engine: Engine) -> dict[str, float]:
    """Parameter -> the smallest magnitude that at least 1 - sparsity of its weights do not exceed.

    Of float32 it is rounded up to the next that differs in the upper 16 bits, 0.4 % at most. Reads every weight once,
    through 64 MiB.

    Args:
        sparsity: the share of weights that shall not move.

    Raises:
        StorageError: something could not be read.
    """
    counts = {name: torch.zeros(KINDS, dtype=torch.int64) for name in sources}
    pool = transit.buffers()
    try:
        transit.bring([(source, _counting(counts[name])) for name, source in sources.items()], engine, pool)
    finally:
        pool.close()
    found = {}
    for name, source in sources.items():
        elements = prod(source.shape)
        moving = elements - floor(sparsity * elements)
        last = int(torch.searchsorted(counts[name].cumsum(0), moving))
        bits = last << 16 | (0 if source.dtype is torch.bfloat16 else 0xFFFF)
        found[name] = float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))
    return found


def _counting(count: torch.Tensor) -> transit.Put:
    """Counts magnitudes by their upper bits."""

    def put(start: int, values: torch.Tensor) -> None:
        for part in values.split(AT_ONCE):
            if part.dtype is torch.bfloat16:
                bits = part.view(torch.int16).to(torch.int32)
            else:
                bits = part.view(torch.int32) >> 16
            count.add_(torch.bincount(bits & KINDS - 1, minlength=KINDS))

    return put
