"""The sum of squares, of which a gradient's norm is made."""

from __future__ import annotations

import torch


def square_sum(values: torch.Tensor) -> float:
    """The sum of the squares of all elements; finite only if every element is.

    Args:
        values: bfloat16 or float32, contiguous.
    """
    return float(values.double().square().sum())
