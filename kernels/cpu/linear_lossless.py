"""y = x W^T + b straight from 12 bits a weight: a row is unpacked into the cache and multiplied there, by the same
sum as a plain bf16 row, so the results are equal bit by bit.
"""

from __future__ import annotations

import torch

from offload.kernels.cpu.dot import make_products
from offload.kernels.cpu.linear import MAX_ROWS, step_of
from offload.kernels.cpu.lossless import unpack_row
from offload.kernels.cpu.memory import claim, get_bf16, get_i32, get_i64, load_pairs, put_bf16
from offload.kernels.cpu.several import Call, run
from offload.kernels.cpu.team import team_function
from offload.kernels.formats.lossless import LosslessWeight

_multiply = make_products(load_pairs, get_bf16, put_bf16, get_bf16, by_pairs=True, nbytes=0)


@team_function("linear_lossless")
def _linear_lossless(block: int) -> None:
    pieces, step, stride = get_i64(block, 1), get_i64(block, 2), get_i64(block, 4)
    scratch = get_i64(block, 5) + claim(block + 3 * 8) * 4 * stride  # this thread's four rows
    low, codes, largest, starts = get_i64(block, 6), get_i64(block, 7), get_i64(block, 8), get_i64(block, 9)
    at, exponents, x = get_i64(block, 10), get_i64(block, 11), get_i64(block, 12)
    bias, y, rows = get_i64(block, 13), get_i64(block, 14), get_i64(block, 15)
    outputs, inputs, padded = get_i64(block, 16), get_i64(block, 17), get_i64(block, 18)
    patches = get_i64(block, 19)
    piece = claim(block)
    while piece < pieces:
        stop = min(outputs, (piece + 1) * step)
        for first in range(piece * step, stop, 4):
            last = min(stop, first + 4)
            for n in range(first, last):
                begin, end, of_row = get_i32(starts, n), get_i32(starts, n + 1), n * padded
                out = scratch + (n - first) * stride
                unpack_row(low + of_row, codes + of_row // 2, largest, at, exponents, patches, begin, end, out, inputs)
            _multiply(scratch, stride, first, last, x, rows, outputs, inputs, 0, bias, y)
        piece = claim(block)


def refuses(x: torch.Tensor, weight: LosslessWeight, bias: torch.Tensor | None = None) -> str | None:
    """Why `linear_lossless` would not take these; None when it does."""
    if x.device.type != "cpu":
        return f"on {x.device}"
    if x.dtype != torch.bfloat16:
        return f"{x.dtype} by bfloat16"
    if not x.is_contiguous():
        return "not contiguous"
    if x.shape[-1] == 0 or not 0 < x.numel() // x.shape[-1] <= MAX_ROWS:
        return f"more than {MAX_ROWS} rows, or none"
    return None


def linear_lossless(x: torch.Tensor, weight: LosslessWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """See offload.kernels.reference.linear_lossless; equal to offload.kernels.cpu.linear on the unpacked matrix."""
    return run([plan(x, weight, bias)])[0]


def plan(x: torch.Tensor, weight: LosslessWeight, bias: torch.Tensor | None = None) -> Call:
    """That product, to be run with others."""
    outputs, padded = weight.low.shape
    y = torch.empty(*x.shape[:-1], outputs, dtype=x.dtype)
    scratch = torch.empty(torch.get_num_threads(), 4, padded, dtype=torch.int16)
    step = step_of(padded * 3 // 2, outputs)
    arguments = (
        step, 0, 2 * padded, scratch.data_ptr(), weight.low.data_ptr(), weight.codes.data_ptr(),
        weight.largest, weight.patch_start.data_ptr(), weight.patch_input.data_ptr(), weight.patch_exponent.data_ptr(),
        x.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr(), x.numel() // weight.inputs, outputs,
        weight.inputs, padded, len(weight.patch_input),
    )  # fmt: skip
    return Call(_linear_lossless, -(-outputs // step), arguments, (scratch,), lambda: y)
