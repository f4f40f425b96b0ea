"""y = x W^T + b for many rows of x in bf16: a product of matrices, on processors that multiply pairs of bf16.

Each thread takes 64 rows of W at a time, reorders a part of them into its level-two cache (16 x 16 pairs transposed, so
that a vector holds one pair of 16 rows), and multiplies it by six rows of x at a time, with 24 sums in registers; the
pairs of x are broadcast from where they lie (the loops around are those of Goto and van de Geijn, 2008). Meanwhile
memory is asked for the rows that come next, since reordering would wait for them.

A sum is one chain over the pairs in their order, in float32, rounded once: a result depends neither on other rows nor
on how many there are, nor on the threads, nor on where the weights lie.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

import torch
from llvmlite.binding import get_host_cpu_features
from numba import float32, int64

from offload.kernels.cpu.helper import helper
from offload.kernels.cpu.lanes import transpose
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
    store_u32,
)
from offload.kernels.cpu.team import team_function
from offload.kernels.cpu.vector import fma_pairs, splat_f32, splat_u32

MIN_ROWS = 8  # below, kernels for few rows read weights faster
WIDE = 64  # rows of W at a time
DEEP = 1024  # pairs of them at a time: with all 64 rows, a quarter of a MiB
TALL = 6  # rows of x at a time
_memory = threading.local()


@helper
def _pack(w: int, stride: int, groups: int, pairs: int, to: int) -> None:
    """`pairs` of 16 * `groups` rows of W to [pairs, WIDE]."""
    for group in range(groups):
        r = w + 16 * group * stride
        for pair in range(0, pairs, 16):
            columns = transpose((
                load_u32(r, pair), load_u32(r + stride, pair),
                load_u32(r + 2 * stride, pair), load_u32(r + 3 * stride, pair),
                load_u32(r + 4 * stride, pair), load_u32(r + 5 * stride, pair),
                load_u32(r + 6 * stride, pair), load_u32(r + 7 * stride, pair),
                load_u32(r + 8 * stride, pair), load_u32(r + 9 * stride, pair),
                load_u32(r + 10 * stride, pair), load_u32(r + 11 * stride, pair),
                load_u32(r + 12 * stride, pair), load_u32(r + 13 * stride, pair),
                load_u32(r + 14 * stride, pair), load_u32(r + 15 * stride, pair),
            ))  # fmt: skip
            at = pair * WIDE + 16 * group
            for k in range(16):
                store_u32(to, at + k * WIDE, columns[k])


@helper
def _load(sums: int, row: int) -> Any:
    at = row * WIDE
    return load_f32(sums, at), load_f32(sums, at + 16), load_f32(sums, at + 32), load_f32(sums, at + 48)


@helper
def _store(sums: int, row: int, value: Any) -> None:
    at = row * WIDE
    store_f32(sums, at, value[0])
    store_f32(sums, at + 16, value[1])
    store_f32(sums, at + 32, value[2])
    store_f32(sums, at + 48, value[3])


@helper
def _dots(w: Any, x: Any, sums: Any) -> Any:
    """Four vectors of pairs by a pair in all lanes."""
    return (
        fma_pairs(w[0], x, sums[0]),
        fma_pairs(w[1], x, sums[1]),
        fma_pairs(w[2], x, sums[2]),
        fma_pairs(w[3], x, sums[3]),
    )


@helper
def _multiply(
    x: int, stride: int, left: int, packed: int, pairs: int, sums: int, is_first: bool, ask: int, apart: int, lines: int
) -> None:
    """TALL rows of x, of which `left` exist, by packed pairs; and asks for as many lines of `lines` rows from `ask`."""
    x1, x2, x3 = x + min(1, left - 1) * stride, x + min(2, left - 1) * stride, x + min(3, left - 1) * stride
    x4, x5 = x + min(4, left - 1) * stride, x + min(5, left - 1) * stride
    zero = splat_f32(float32(0))
    a = b = c = d = e = f = (zero, zero, zero, zero)
    if not is_first:
        a, b, c = _load(sums, 0), _load(sums, 1), _load(sums, 2)
        d, e, f = _load(sums, 3), _load(sums, 4), _load(sums, 5)
    for start in range(0, pairs, 16):
        for line in range(lines):
            prefetch(ask + line * apart + 4 * start)
        for k in range(start, start + 16):
            at = k * WIDE
            w = load_u32(packed, at), load_u32(packed, at + 16), load_u32(packed, at + 32), load_u32(packed, at + 48)
            a = _dots(w, splat_u32(get_u32(x, k)), a)
            b = _dots(w, splat_u32(get_u32(x1, k)), b)
            c = _dots(w, splat_u32(get_u32(x2, k)), c)
            d = _dots(w, splat_u32(get_u32(x3, k)), d)
            e = _dots(w, splat_u32(get_u32(x4, k)), e)
            f = _dots(w, splat_u32(get_u32(x5, k)), f)
    _store(sums, 0, a)
    _store(sums, 1, b)
    _store(sums, 2, c)
    _store(sums, 3, d)
    _store(sums, 4, e)
    _store(sums, 5, f)


@helper
def strip(
    x: int, w: int, bias: int, y: int, rows: int, height: int, outputs: int, inputs: int, packed: int, ask: int,
    most: int,
) -> None:  # fmt: skip
    """Rows of x by `height` rows of W, at most WIDE and a multiple of 16.

    Args:
        x, w, bias, y: addresses; of W, of the bias (or 0) and of y that of the first of these rows of W.
        outputs, inputs: of all of W.
        packed: this thread's memory, of `scratch_nbytes`.
        ask: address of the rows of W that this thread takes next.
        most: how many they are.
    """
    sums, stride, pairs, groups = packed + 4 * DEEP * WIDE, 2 * inputs, inputs // 2, height // 16
    share = max(int64(1), WIDE * TALL // (rows + TALL - 1))  # rows of W to ask for while six rows of x are multiplied
    for start in range(0, pairs, DEEP):
        deep = min(int64(DEEP), pairs - start)
        _pack(w + 4 * start, stride, groups, deep, packed)
        asked, coming, left = int64(0), w + 4 * (start + DEEP), height
        if start + DEEP >= pairs:
            coming, left = ask, most
        for row in range(0, rows, TALL):
            lines = max(int64(0), min(share, left - asked))
            _multiply(
                x + row * stride + 4 * start, stride, rows - row, packed, deep, sums + 4 * WIDE * row, start == 0,
                coming + asked * stride, stride, lines,
            )  # fmt: skip
            asked += lines
    for row in range(rows):
        for group in range(groups):
            value = load_f32(sums, row * WIDE + 16 * group)
            if bias:
                value = value + load_bf16(bias, 16 * group)
            store_bf16(y, row * outputs + 16 * group, value)


@team_function("linear_many_bf16")
def _many(block: int) -> None:
    pieces, x, w, bias, y = (
        get_i64(block, 1),
        get_i64(block, 2),
        get_i64(block, 3),
        get_i64(block, 4),
        get_i64(block, 5),
    )
    rows, outputs, inputs = get_i64(block, 6), get_i64(block, 7), get_i64(block, 8)
    packed = get_i64(block, 9) + claim(block + 11 * 8) * get_i64(block, 10)  # this thread's
    stride, piece = 2 * inputs, claim(block)
    while piece < pieces:
        coming, first = claim(block), piece * WIDE
        most = min(int64(WIDE), outputs - coming * WIDE) if coming < pieces else int64(0)
        strip(
            x, w + first * stride, bias + 2 * first if bias else int64(0), y + 2 * first, rows,
            min(int64(WIDE), outputs - first), outputs, inputs, packed, w + coming * WIDE * stride, most,
        )  # fmt: skip
        piece = coming


def refuses(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> str | None:
    """Why `linear_many` would not take these; None when it does."""
    if x.device.type != "cpu":
        return f"on {x.device}"
    if x.dtype != torch.bfloat16 or weight.dtype != torch.bfloat16:
        return f"{x.dtype} by {weight.dtype}"
    if not has_pairs():
        return "a processor without products of pairs of bf16"
    if not (x.is_contiguous() and weight.is_contiguous()):
        return "not contiguous"
    outputs, inputs = weight.shape
    if outputs % 16 or inputs % 32 or not outputs or not inputs:
        return f"{outputs} x {inputs}, not multiples of 16 and 32"
    if x.numel() // inputs < MIN_ROWS:
        return f"fewer than {MIN_ROWS} rows"
    return None


def linear_many(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """torch.nn.functional.linear for many rows.

    Args:
        x: [..., inputs], contiguous, bfloat16.
        weight: [outputs, inputs], contiguous, bfloat16.
        bias: [outputs] of that dtype, or None.

    Returns:
        [..., outputs] of that dtype.
    """
    outputs, inputs = weight.shape
    rows, threads = x.numel() // inputs, torch.get_num_threads()
    y = torch.empty(*x.shape[:-1], outputs, dtype=x.dtype)
    size = scratch_nbytes(rows)
    places = x.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr()
    _many(-(-outputs // WIDE), *places, rows, outputs, inputs, scratch(size * threads), size, 0)
    return y


def scratch_nbytes(rows: int) -> int:
    """What a thread needs to multiply so many rows: a part of W in the order of products, and sums."""
    return 4 * WIDE * (DEEP + -(-rows // TALL) * TALL) + 4096


def scratch(nbytes: int) -> int:
    """The address of memory for one call at a time of this thread."""
    held = getattr(_memory, "held", None)
    if held is None or held.numel() < nbytes + 4096:
        held = _memory.held = torch.empty(nbytes + 4096, dtype=torch.uint8)
    return -(-int(held.data_ptr()) // 4096) * 4096


@functools.cache
def has_pairs() -> bool:
    """Whether this processor multiplies pairs of bf16."""
    return bool(get_host_cpu_features().get("avx512bf16"))
