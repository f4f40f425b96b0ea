"""Work that every first pass would do once, done while the disk is busy filling memory anyway."""

from __future__ import annotations

import torch
from torch.nn import functional

from offload.kernels import Choice

_WIDTH = 256


def compile_linear(choice: Choice, dtype: torch.dtype) -> None:
    """Imports the kernel and compiles it, or fetches it from its cache. Do it before memory is divided: compilers are
    large, and stay in the process.
    """
    x = torch.zeros(1, _WIDTH, dtype=dtype)
    weight = torch.zeros(_WIDTH, _WIDTH, dtype=dtype)
    if choice.refuses()(x, weight) is None:
        choice.function()(x, weight)


def warm_kernels(dtype: torch.dtype, device: torch.device) -> None:
    """Runs a small matrix product, a matrix-vector product and an attention, so that libraries start their threads and
    compile their first kernels now. Call it in the thread that will run the model: thread pools belong to their caller.
    """
    if not dtype.is_floating_point or dtype.itemsize < 2:
        return
    weight = torch.zeros(_WIDTH, _WIDTH, dtype=dtype, device=device)
    with torch.no_grad():
        for rows in (32, 1):
            x = torch.zeros(rows, _WIDTH, dtype=dtype, device=device)
            functional.linear(x, weight)
            heads = torch.zeros(1, 4, rows, 64, dtype=dtype, device=device)
            functional.scaled_dot_product_attention(heads, heads, heads)
