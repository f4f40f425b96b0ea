"""Work that every first pass would do once, done while the disk is busy filling memory anyway."""

from __future__ import annotations

import torch
from torch.nn import functional

_WIDTH = 256


def warm_kernels(dtype: torch.dtype, device: torch.device) -> None:
    """Runs a small matrix product, a matrix-vector product and an attention, so that libraries start their threads and
    compile their first kernels now. Call it in the thread that will run the model: thread pools belong to their caller.
    """
    if not dtype.is_floating_point or dtype.itemsize < 2:
        return
    weight = torch.zeros(_WIDTH, _WIDTH, dtype=dtype, device=device)
    with torch.no_grad():
        for rows in (32, 1):
            functional.linear(torch.zeros(rows, _WIDTH, dtype=dtype, device=device), weight)
            heads = torch.zeros(1, 4, rows, 64, dtype=dtype, device=device)
            functional.scaled_dot_product_attention(heads, heads, heads)
