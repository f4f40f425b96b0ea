"""y = x W + b for few rows of x, where W lies as [inputs, outputs], as transformers' Conv1D has it: in bf16.

A sum runs down a column, so two rows of W are read side by side and put together in pairs (one of each) for the
product of pairs. Each thread takes a strip of columns, goes down it 16 rows at a time, and keeps the strip's sums in
the nearest cache; memory is asked for the next 16 rows meanwhile. A sum is one chain over the pairs in their order,
rounded once: it depends neither on other rows of x, nor on the threads, nor on where the weights lie.
"""

from __future__ import annotations

from typing import Any

import torch
from numba import float32, uint32

from offload.kernels.cpu.helper import helper
from offload.kernels.cpu.lanes import zip_high, zip_low
from offload.kernels.cpu.linear_many import has_pairs, scratch
from offload.kernels.cpu.memory import (
    claim,
    get_i64,
    get_u32,
    load_bf16,
    load_f32,
    load_u32,
    prefetch,
    store_bf16,
    store_f32,
)
from offload.kernels.cpu.team import team_function
from offload.kernels.cpu.vector import fma_pairs, splat_f32, splat_u32

DEEP = 16  # rows of W at a time
WIDE = 512  # columns of a strip, at most: the sums of MAX_ROWS rows stay in the nearest cache
MAX_ROWS = 4  # beyond, torch's product of matrices is as fast


@helper
def _paired(w: int, stride: int) -> Any:
    """32 columns of two rows of W: pairs of the even columns, and of the odd ones."""
    low, high = splat_u32(uint32(0xFFFF)), splat_u32(uint32(0xFFFF0000))
    half = splat_u32(uint32(16))
    upper, lower = load_u32(w, 0), load_u32(w + stride, 0)
    return (upper & low) | (lower << half), (upper >> half) | (lower & high)


@helper
def _load(sums: int, is_first: bool) -> Any:
    zero = splat_f32(float32(0))
    if is_first:
        return zero, zero
    return load_f32(sums, 0), load_f32(sums, 16)


@helper
def _store(sums: int, value: Any) -> None:
    store_f32(sums, 0, value[0])
    store_f32(sums, 16, value[1])


@helper
def _dots(both: Any, by: Any, sums: Any) -> Any:
    return fma_pairs(both[0], by, sums[0]), fma_pairs(both[1], by, sums[1])


@helper
def _down_one(w: int, stride: int, x: int, sums: int, is_first: bool) -> None:
    """One row of x by DEEP rows of 32 columns."""
    a = _load(sums, is_first)
    for pair in range(DEEP // 2):
        at = w + 2 * pair * stride
        prefetch(at + DEEP * stride)
        prefetch(at + (DEEP + 1) * stride)
        a = _dots(_paired(at, stride), splat_u32(get_u32(x, pair)), a)
    _store(sums, a)


@helper
def _down_four(w: int, stride: int, x: int, apart: int, rows: int, sums: int, is_first: bool) -> None:
    """MAX_ROWS rows of x (`rows` of them exist) by DEEP rows of 32 columns; a row's sums lie WIDE behind another's."""
    x1, x2, x3 = x + min(1, rows - 1) * apart, x + min(2, rows - 1) * apart, x + min(3, rows - 1) * apart
    a, b = _load(sums, is_first), _load(sums + 4 * WIDE, is_first)
    c, d = _load(sums + 8 * WIDE, is_first), _load(sums + 12 * WIDE, is_first)
    for pair in range(DEEP // 2):
        at = w + 2 * pair * stride
        prefetch(at + DEEP * stride)
        prefetch(at + (DEEP + 1) * stride)
        both = _paired(at, stride)
        a = _dots(both, splat_u32(get_u32(x, pair)), a)
        b = _dots(both, splat_u32(get_u32(x1, pair)), b)
        c = _dots(both, splat_u32(get_u32(x2, pair)), c)
        d = _dots(both, splat_u32(get_u32(x3, pair)), d)
    _store(sums, a)
    _store(sums + 4 * WIDE, b)
    _store(sums + 8 * WIDE, c)
    _store(sums + 12 * WIDE, d)


@team_function("linear_transposed_bf16")
def _transposed(block: int) -> None:
    pieces, x, w, bias, y = (
        get_i64(block, 1),
        get_i64(block, 2),
        get_i64(block, 3),
        get_i64(block, 4),
        get_i64(block, 5),
    )
    rows, outputs, inputs, width = get_i64(block, 6), get_i64(block, 7), get_i64(block, 8), get_i64(block, 9)
    sums = get_i64(block, 10) + claim(block + 12 * 8) * get_i64(block, 11)  # this thread's
    stride, apart, piece = 2 * outputs, 2 * inputs, claim(block)
    while piece < pieces:
        first = piece * width
        last = min(outputs, first + width)
        for start in range(0, inputs, DEEP):
            for column in range(first, last, 32):
                at, where = w + start * stride + 2 * column, sums + 4 * (column - first)
                if rows == 1:
                    _down_one(at, stride, x + 2 * start, where, start == 0)
                else:
                    _down_four(at, stride, x + 2 * start, apart, rows, where, start == 0)
        for row in range(rows):
            for column in range(first, last, 32):
                where, to = sums + 4 * WIDE * row + 4 * (column - first), y + 2 * (row * outputs + column)
                even, odd = load_f32(where, 0), load_f32(where, 16)
                low, high = zip_low(even, odd), zip_high(even, odd)
                if bias:
                    low, high = low + load_bf16(bias, column), high + load_bf16(bias, column + 16)
                store_bf16(to, 0, low)
                store_bf16(to, 16, high)
        piece = claim(block)


def refuses(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> str | None:
    """Why `linear_transposed` would not take these; None when it does."""
    if x.device.type != "cpu":
        return f"on {x.device}"
    if x.dtype != torch.bfloat16 or weight.dtype != torch.bfloat16:
        return f"{x.dtype} by {weight.dtype}"
    if not has_pairs():
        return "a processor without products of pairs of bf16"
    if not (x.is_contiguous() and weight.is_contiguous()):
        return "not contiguous"
    inputs, outputs = weight.shape
    if outputs % 32 or inputs % DEEP or not outputs or not inputs:
        return f"{inputs} x {outputs}, not multiples of {DEEP} and 32"
    if not 0 < x.numel() // inputs <= MAX_ROWS:
        return f"more than {MAX_ROWS} rows, or none"
    return None


def linear_transposed(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """See offload.kernels.reference.linear_transposed.

    Args:
        x: [..., inputs], contiguous, bfloat16.
        weight: [inputs, outputs], contiguous, bfloat16.
        bias: [outputs] of that dtype, or None.

    Returns:
        [..., outputs] of that dtype.
    """
    inputs, outputs = weight.shape
    rows, threads = x.numel() // inputs, torch.get_num_threads()
    y = torch.empty(*x.shape[:-1], outputs, dtype=x.dtype)
    strips = threads * -(-outputs // (threads * WIDE))  # as many for each thread, none wider than WIDE
    width = 32 * -(-outputs // (32 * strips))
    size = 4 * WIDE * MAX_ROWS
    places = x.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr()
    memory = scratch(size * threads)
    _transposed(-(-outputs // width), *places, rows, outputs, inputs, width, memory, size, 0)
    return y
