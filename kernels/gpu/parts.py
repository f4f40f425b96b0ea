"""Inputs of a product divided between programs, where outputs alone are too few to fill a GPU; and the parts added.

The division depends on the matrix only, and parts are added in their order: an output is the same bits every time, on
any GPU, in any company of other rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from offload.kernels.gpu.numbers import rounded

FILL = 128  # programs that keep a large GPU busy: about one for each multiprocessor of an H100
_BLOCK = 256  # outputs that a program adds up


def block_for(outputs: int, blocks: tuple[int, ...]) -> int:
    """The first of `blocks`, large to small, that makes enough programs; else the last."""
    return next((block for block in blocks if outputs >= FILL * block), blocks[-1])


def split(blocks: int, steps: int) -> tuple[int, int]:
    """(parts, steps of each) for so many blocks of outputs and steps along the inputs; the last part may be shorter."""
    parts = min(triton.cdiv(FILL, blocks), steps)
    step = triton.cdiv(steps, parts)
    return triton.cdiv(steps, step), step


@triton.jit(do_not_specialize=["parts", "rows"])
def _add(sums, bias, y, parts, rows, outputs, BLOCK: tl.constexpr):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1)
    inside = n < outputs
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(parts):
        total += tl.load(sums + (part * rows + row) * outputs + n, mask=inside, other=0.0)
    if bias is not None:
        total += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * outputs + n, rounded(total, y.dtype.element_ty), mask=inside)


def place_for(y: torch.Tensor, parts: int) -> torch.Tensor:
    """Where programs write: the result itself, or float32 [parts, rows, outputs] for `add`."""
    return y if parts == 1 else torch.empty(parts, *y.shape, dtype=torch.float32, device=y.device)


def add(sums: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor) -> None:
    """y [rows, outputs] is the sum over parts, and the bias; nothing where there was one part."""
    if sums is not y:
        rows, outputs = y.shape
        _add[(triton.cdiv(outputs, _BLOCK), rows)](sums, bias, y, len(sums), rows, outputs, BLOCK=_BLOCK)
