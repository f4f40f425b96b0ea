"""silu(x Wg^T) * (x Wu^T) in any format: both products by their kernels, the rest by torch while it lies in a cache.

One compiled function for it all would save a call of a few microseconds, against the milliseconds of the weights, and
the results would no longer be those of the modules one by one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from offload.kernels.cpu import linear, linear_int4, linear_int8, linear_lossless
from offload.kernels.formats.int4 import Int4Weight
from offload.kernels.formats.int8 import Int8Weight
from offload.kernels.formats.lossless import LosslessWeight
from offload.kernels.reference.gate_up_silu import Weight

_PRODUCTS: dict[type, tuple[Callable[..., torch.Tensor], Callable[..., str | None]]] = {
    Int8Weight: (linear_int8.linear_int8, linear_int8.refuses),
    Int4Weight: (linear_int4.linear_int4, linear_int4.refuses),
    LosslessWeight: (linear_lossless.linear_lossless, linear_lossless.refuses),
}
_PLAIN = linear.linear, linear.refuses


def refuses(x: torch.Tensor, gate: Weight, up: Weight) -> str | None:
    """Why `gate_up_silu` would not take these; None when it does."""
    return next(
        (why for weight in (gate, up) if (why := _PRODUCTS.get(type(weight), _PLAIN)[1](x, weight)) is not None), None
    )


def gate_up_silu(x: torch.Tensor, gate: Weight, up: Weight) -> torch.Tensor:
    """See offload.kernels.reference.gate_up_silu; the bits of the two products and torch's own silu."""
    left, right = (_PRODUCTS.get(type(weight), _PLAIN)[0](x, weight) for weight in (gate, up))
    return functional.silu(left, inplace=True).mul_(right)
