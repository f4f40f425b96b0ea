"""Rows of any float dtype as sums of bf16 rows, so that one kernel multiplies them all."""

from __future__ import annotations

import torch

PARTS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}  # 8 bits of the mantissa each


def in_bf16(x: torch.Tensor) -> torch.Tensor:
    """[rows, inputs] -> bfloat16 [PARTS * rows, inputs], contiguous: the first parts of all rows, then the second."""
    if x.dtype == torch.bfloat16:
        return x.contiguous()
    left, parts = x.float(), []
    for _ in range(PARTS[x.dtype]):
        parts.append(left.bfloat16())
        left = left - parts[-1].float()
    return torch.cat(parts)


def joined(y: torch.Tensor, dtype: torch.dtype, bias: torch.Tensor | None) -> torch.Tensor:
    """The products of those rows, float32 [PARTS * rows, outputs], as [rows, outputs] of x's dtype, plus a bias."""
    if PARTS[dtype] > 1:
        y = y.view(PARTS[dtype], -1, y.shape[1]).sum(0)
    return (y if bias is None else y.add_(bias)).to(dtype)
