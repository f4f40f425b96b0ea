"""Products with a matrix, whatever its format."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from offload.kernels.formats.int4 import Int4Weight, dequantize_int4
from offload.kernels.formats.int8 import Int8Weight, dequantize_int8
from offload.kernels.formats.lossless import LosslessWeight, unpack_lossless


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., inputs] by weight [outputs, inputs], plus bias [outputs]."""
    return functional.linear(x, weight, bias)


linear_many = linear


def linear_transposed(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., inputs] by weight [inputs, outputs], plus bias [outputs]."""
    return functional.linear(x, weight.T, bias)


def linear_groups(x: torch.Tensor, weight: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """x [sum of rows, inputs], group by group, by weight [groups, outputs, inputs]: each row by its group's matrix."""
    parts = [functional.linear(part, weight[group]) for group, part in enumerate(x.split(list(rows))) if len(part)]
    return torch.cat(parts) if parts else x.new_empty(0, weight.shape[1])


def linear_int8(x: torch.Tensor, weight: Int8Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """As `linear`, in float32 throughout; the result has x's dtype."""
    wide = functional.linear(x.float(), dequantize_int8(weight), None if bias is None else bias.float())
    return wide.to(x.dtype)


def linear_int4(x: torch.Tensor, weight: Int4Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """As `linear`, in float32 throughout; the result has x's dtype."""
    wide = functional.linear(x.float(), dequantize_int4(weight), None if bias is None else bias.float())
    return wide.to(x.dtype)


def linear_lossless(x: torch.Tensor, weight: LosslessWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """As `linear` with the matrix unpacked."""
    return linear(x, unpack_lossless(weight), bias)


Operand = tuple[torch.Tensor | Int8Weight | Int4Weight | LosslessWeight, torch.Tensor | None]
"""A matrix in any format, and a bias."""

_OF = {Int8Weight: linear_int8, Int4Weight: linear_int4, LosslessWeight: linear_lossless}


def linears(x: torch.Tensor, operands: Sequence[Operand]) -> list[torch.Tensor]:
    """One x by several matrices, which need not agree in format or in outputs."""
    return [_OF.get(type(weight), linear)(x, weight, bias) for weight, bias in operands]  # type: ignore[arg-type]
