"""The first half of a gated feed-forward layer."""

from __future__ import annotations

import torch
from torch.nn import functional

from offload.kernels.formats.int4 import Int4Weight
from offload.kernels.formats.int8 import Int8Weight
from offload.kernels.formats.lossless import LosslessWeight
from offload.kernels.reference.linear import linear, linear_int4, linear_int8, linear_lossless

Weight = torch.Tensor | Int8Weight | Int4Weight | LosslessWeight
_PRODUCTS = {Int8Weight: linear_int8, Int4Weight: linear_int4, LosslessWeight: linear_lossless}


def gate_up_silu(x: torch.Tensor, gate: Weight, up: Weight) -> torch.Tensor:
    """silu(x gate^T) * (x up^T), each step rounded to x's dtype, as in transformers' modules.

    Args:
        x: [..., inputs].
        gate, up: [outputs, inputs], each in any format.

    Returns:
        [..., outputs] of x's dtype.
    """
    left, right = (_PRODUCTS.get(type(weight), linear)(x, weight) for weight in (gate, up))  # type: ignore[arg-type]
    return functional.silu(left) * right
