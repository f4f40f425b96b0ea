"""y = x W^T + b with W in 12 bits, unpacked for the product: the bits of torch's own op on the plain matrix."""

from __future__ import annotations

import torch
from torch.nn import functional

from offload.kernels.formats.lossless import LosslessWeight
from offload.kernels.gpu import unpack_lossless as unpacking
from offload.kernels.gpu.launch import misplaced


def refuses(x: torch.Tensor, weight: LosslessWeight, bias: torch.Tensor | None = None) -> str | None:
    """Why `linear_lossless` would not take these; None when it does."""
    if (why := misplaced(x, weight.low, bias)) is not None:
        return why
    if x.dtype != torch.bfloat16:
        return f"{x.dtype} by torch.bfloat16"
    return unpacking.refuses(weight)


def linear_lossless(x: torch.Tensor, weight: LosslessWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """See offload.kernels.reference.linear_lossless; the plain matrix lives on the device until the product is done."""
    return functional.linear(x, unpacking.unpack_lossless(weight), bias)
