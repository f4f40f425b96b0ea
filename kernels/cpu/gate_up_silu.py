"""silu(x Wg^T) * (x Wu^T) in any format: both products in one call, the rest by torch while it lies in a cache.

One compiled function for it all would save microseconds against the milliseconds of the weights, and the results would
no longer be those of the modules one by one.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from offload.kernels.cpu import linears
from offload.kernels.reference.gate_up_silu import Weight


def refuses(x: torch.Tensor, gate: Weight, up: Weight) -> str | None:
    """Why `gate_up_silu` would not take these; None when it does."""
    return linears.refuses(x, [(gate, None), (up, None)])


def gate_up_silu(x: torch.Tensor, gate: Weight, up: Weight) -> torch.Tensor:
    """See offload.kernels.reference.gate_up_silu; the bits of the two products and torch's own silu."""
    left, right = linears.linears(x, [(gate, None), (up, None)])
    return functional.silu(left, inplace=True).mul_(right)
