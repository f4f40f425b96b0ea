"""y = x W^T + b for few rows of x and 16- or 32-bit weights: each weight is read once, at the rate of memory.

torch's CPU kernel for one row of bf16 reads a third of what memory delivers. Here each thread takes a run of weight
rows, widens them to float32 in registers and multiplies four of them by up to four rows of x at a time; sums are in
float32 whatever the dtype, and a result is rounded once. It depends neither on the number of threads, nor on the other
rows, nor on where the weights lie.
"""

from __future__ import annotations

from typing import Any

import torch

from offload.kernels.cpu.dot import make_products
from offload.kernels.cpu.memory import (
    claim,
    get_bf16,
    get_f16,
    get_f32,
    get_i64,
    load_f16,
    load_f32,
    load_pairs,
    put_bf16,
    put_f16,
    put_f32,
)
from offload.kernels.cpu.several import Call, run
from offload.kernels.cpu.team import TeamFunction, team_function

PIECE_NBYTES = 128 << 10, 1 << 20  # of weights, least and most: processors prefetch better in one long run
SHARE = 8  # pieces for each thread, if they are not too short: then all are done at about the same time
MAX_ROWS = 4  # beyond, torch's matrix product is as fast or faster


def _make(name: str, load: Any, get: Any, put: Any, itemsize: int) -> TeamFunction:
    multiply = make_products(
        load, get, put, get, by_pairs=load is load_pairs, nbytes=64 if load is load_pairs else 16 * itemsize
    )

    @team_function(name)
    def linear(block: int) -> None:
        pieces, step = get_i64(block, 1), get_i64(block, 2)
        x, w, bias, y = get_i64(block, 3), get_i64(block, 4), get_i64(block, 5), get_i64(block, 6)
        rows, outputs, inputs = get_i64(block, 7), get_i64(block, 8), get_i64(block, 9)
        stride = inputs * itemsize
        piece = claim(block)
        while piece < pieces:
            first = piece * step
            last = min(outputs, first + step)
            multiply(w + first * stride, stride, first, last, x, rows, outputs, inputs, 0, bias, y)
            piece = claim(block)

    return linear


_FUNCTIONS = {
    torch.bfloat16: _make("linear_bf16", load_pairs, get_bf16, put_bf16, 2),
    torch.float16: _make("linear_f16", load_f16, get_f16, put_f16, 2),
    torch.float32: _make("linear_f32", load_f32, get_f32, put_f32, 4),
}


def step_of(stride: int, outputs: int = 0) -> int:
    """Outputs in a piece: whole groups of four.

    Args:
        stride: bytes of an output's weights.
        outputs: how many there are, to make pieces long where that leaves enough of them.
    """
    least, most = PIECE_NBYTES
    nbytes = min(most, max(least, outputs * stride // (SHARE * torch.get_num_threads())))
    return max(1, nbytes // stride // 4) * 4


def refuses(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> str | None:
    """Why `linear` would not take these; None when it does."""
    if x.device.type != "cpu":
        return f"on {x.device}"
    if weight.dtype not in _FUNCTIONS or x.dtype != weight.dtype:
        return f"{x.dtype} by {weight.dtype}"
    if not (x.is_contiguous() and weight.is_contiguous()):
        return "not contiguous"
    if x.shape[-1] == 0 or not 0 < x.numel() // x.shape[-1] <= MAX_ROWS:
        return f"more than {MAX_ROWS} rows, or none"
    return None


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """torch.nn.functional.linear for at most MAX_ROWS rows.

    Args:
        x: [..., inputs], contiguous.
        weight: [outputs, inputs], contiguous, of the same dtype: bfloat16, float16 or float32.
        bias: [outputs] of that dtype, or None.

    Returns:
        [..., outputs] of that dtype.
    """
    return run([plan(x, weight, bias)])[0]


def plan(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Call:
    """That product, to be run with others."""
    outputs, inputs = weight.shape
    y = torch.empty(*x.shape[:-1], outputs, dtype=x.dtype)
    wide = x if x.dtype == torch.bfloat16 else x.float()
    step = step_of(inputs * weight.itemsize, outputs)
    places = wide.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr()
    arguments = step, *places, x.numel() // inputs, outputs, inputs
    return Call(_FUNCTIONS[x.dtype], -(-outputs // step), arguments, (wide,), lambda: y)
