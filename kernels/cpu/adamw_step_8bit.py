"""AdamW in one pass with moments in dynamic 8 bits: 16 bytes a parameter with a bf16 gradient, 8 read and 8 written."""

from __future__ import annotations

import functools
from typing import Any

import torch
from numba import float32, int64, uint32

from offload.kernels import reference
from offload.kernels.cpu.adamw_step import AHEAD, constants
from offload.kernels.cpu.convert import as_f32, as_u32, to_f32, to_i32
from offload.kernels.cpu.helper import helper
from offload.kernels.cpu.lanes import first, larger, largest, pick, smaller, total
from offload.kernels.cpu.memory import (
    claim,
    get_f32,
    get_i64,
    load_bf16,
    load_f32,
    load_u32,
    load_u32_low,
    prefetch,
    put_f32,
    scratch,
    store_bf16,
    store_f32,
    store_signed_codes,
    store_u32_low,
    stream_bf16,
)
from offload.kernels.cpu.team import TeamFunction, team_function
from offload.kernels.cpu.vector import absolute, fma, leading_zeros, magnitude, splat_f32, splat_u32, sqrt
from offload.kernels.formats.dynamic8 import BLOCK, LEAST_LARGEST, SMALLEST, Dynamic8, dynamic8_tables
from offload.kernels.reference import AdamW

BLOCKS = 256  # of 256 parameters, that a thread claims; their sum of squares is kept, so that threads change nothing
_TABLES = 16  # floats before the tables in the block of numbers
_SIGNED, _UNSIGNED = _TABLES, _TABLES + 6 * 16


@helper(inline=True)
def _value(rank: Any, slope: Any, offset: Any) -> Any:
    index = leading_zeros(rank)
    return fma(to_f32(rank), pick(slope, index), pick(offset, index))


@helper(inline=True)
def _rank(size: Any, inverse: Any, carry: Any, up: Any, base: Any, top: Any) -> Any:
    """See Dynamic8Tables; yet to be rounded towards zero."""
    x = fma(size, inverse, splat_f32(float32(SMALLEST)))
    shift = splat_u32(uint32(24))
    part = (as_u32(x) + pick(carry, as_u32(x) >> shift)) >> shift
    return smaller(fma(x, pick(up, part), pick(base, part)), pick(top, part))


@helper(inline=True)
def _quantize(values: int, largest: Any, codes: int, k: int, tables: int, signed: bool) -> None:
    """256 float32 to the codes from k on."""
    carry = load_u32(tables, 32)
    up, base, top = load_f32(tables, 48), load_f32(tables, 64), load_f32(tables, 80)
    inverse = splat_f32(float32(1) / max(largest, float32(LEAST_LARGEST)))
    sign = splat_u32(uint32(0x80000000))
    for j in range(0, BLOCK, 16):
        value = load_f32(values, j)
        if signed:
            rank = _rank(magnitude(value), inverse, carry, up, base, top)
            store_signed_codes(codes, k + j, to_i32(as_f32(as_u32(rank) | (sign - (as_u32(value) & sign)))))
        else:
            store_u32_low(codes, k + j, to_i32(_rank(value, inverse, carry, up, base, top)))


def _make(name: str, load: Any, grad_nbytes: int) -> TeamFunction:
    @team_function(name)
    def adamw_step_8bit(block: int) -> None:
        pieces, blocks, master, grad = get_i64(block, 1), get_i64(block, 2), get_i64(block, 3), get_i64(block, 4)
        weight, numbers, squares = get_i64(block, 5), get_i64(block, 6), get_i64(block, 7)
        mean, mean_largest, square, square_largest = (
            get_i64(block, 8), get_i64(block, 9), get_i64(block, 10), get_i64(block, 11),
        )  # fmt: skip
        means, roots = scratch(2048), scratch(2048)  # new moments of two blocks
        scale, keep, new1, new2 = get_f32(numbers, 0), get_f32(numbers, 1), get_f32(numbers, 2), get_f32(numbers, 4)
        keep, new1, new2 = splat_f32(keep), splat_f32(new1 * scale), splat_f32(new2 * scale * scale)
        root, eps, rate = splat_f32(get_f32(numbers, 5)), splat_f32(get_f32(numbers, 6)), splat_f32(get_f32(numbers, 7))
        zero, one, sign = splat_u32(uint32(127)), splat_u32(uint32(1)), splat_u32(uint32(0x80000000))
        streams = weight % 64 == 0
        piece = claim(block)
        while piece < pieces:
            sums = splat_f32(float32(0))
            start, end = piece * BLOCKS, min(blocks, (piece + 1) * BLOCKS)
            for b in range(start, end + 1):
                at, here = b * int64(BLOCK), (b & 1) * 1024
                if b < end:
                    # Tables for moments that have decayed already.
                    unit1 = splat_f32(get_f32(mean_largest, b) * get_f32(numbers, 8))
                    unit2 = splat_f32(get_f32(square_largest, b) * get_f32(numbers, 3))
                    slope1, offset1 = load_f32(numbers, _SIGNED) * unit1, load_f32(numbers, _SIGNED + 16) * unit1
                    slope2, offset2 = load_f32(numbers, _UNSIGNED) * unit2, load_f32(numbers, _UNSIGNED + 16) * unit2
                    most1 = most2 = splat_f32(float32(0))
                    p = splat_f32(float32(0))
                    for j in range(0, BLOCK, 16):
                        k, before = at + j, p
                        prefetch(master + (k + AHEAD) * 4)
                        prefetch(grad + (k + AHEAD) * grad_nbytes)
                        g = load(grad, k)
                        gg = g * g
                        sums = sums + gg
                        shifted = load_u32_low(mean, k) - zero
                        m = as_f32(as_u32(_value(absolute(shifted), slope1, offset1)) | (shifted & sign))
                        m = fma(g, new1, m)
                        v = fma(gg, new2, _value(load_u32_low(square, k) + one, slope2, offset2))
                        p = fma(m / fma(sqrt(v), root, eps), rate, load_f32(master, k) * keep)
                        store_f32(master, k, p)
                        store_f32(means + here, j, m)
                        store_f32(roots + here, j, v)
                        most1, most2 = larger(magnitude(m), most1), larger(v, most2)
                        if weight != 0:
                            if not streams:
                                store_bf16(weight, k, p)
                            elif j & 16:
                                stream_bf16(weight, k - 16, before, p)
                    put_f32(mean_largest, b, first(largest(most1)))
                    put_f32(square_largest, b, first(largest(most2)))
                if b > start:  # a block later, so that nothing waits for its largest magnitude
                    k, there = at - BLOCK, 1024 - here
                    most, more = get_f32(mean_largest, b - 1), get_f32(square_largest, b - 1)
                    _quantize(means + there, most, mean, k, numbers + 4 * _SIGNED, True)
                    _quantize(roots + there, more, square, k, numbers + 4 * _UNSIGNED, False)
            put_f32(squares, piece, total(sums))
            piece = claim(block)  # also orders the streamed stores before whatever this thread does next

    return adamw_step_8bit


_FUNCTIONS = {
    dtype: _make(f"adamw_step_8bit_{str(dtype)[6:]}", load, dtype.itemsize)
    for dtype, load in ((torch.bfloat16, load_bf16), (torch.float32, load_f32))
}


def refuses(
    master: torch.Tensor,
    exp_avg: Dynamic8,
    exp_avg_sq: Dynamic8,
    grad: torch.Tensor,
    weight: torch.Tensor | None,
    numbers: AdamW,
) -> str | None:
    """Why `adamw_step_8bit` would not take these; None when it does."""
    if grad.dtype not in (torch.bfloat16, torch.float32):
        return f"a gradient in {grad.dtype}"
    if any(t is not None and not t.is_contiguous() for t in (master, exp_avg.codes, exp_avg_sq.codes, grad, weight)):
        return "not contiguous"
    return None


def adamw_step_8bit(
    master: torch.Tensor,
    exp_avg: Dynamic8,
    exp_avg_sq: Dynamic8,
    grad: torch.Tensor,
    weight: torch.Tensor | None,
    numbers: AdamW,
) -> float:
    """See offload.kernels.reference.adamw_step_8bit."""
    count = master.numel()
    blocks = count // BLOCK
    whole = blocks * BLOCK
    squares = 0.0
    if blocks:
        table = torch.cat([constants(numbers), torch.zeros(_TABLES - 9), _tables()])
        sums = torch.empty(-(-blocks // BLOCKS))
        _FUNCTIONS[grad.dtype](
            len(sums), blocks, master.data_ptr(), grad.data_ptr(), 0 if weight is None else weight.data_ptr(),
            table.data_ptr(), sums.data_ptr(), exp_avg.codes.data_ptr(), exp_avg.largest.data_ptr(),
            exp_avg_sq.codes.data_ptr(), exp_avg_sq.largest.data_ptr(),
        )  # fmt: skip
        squares = float(sums.double().sum())
    if whole < count:
        tail, *states = master.reshape(-1)[whole:], exp_avg.blocks_from(blocks), exp_avg_sq.blocks_from(blocks)
        out = None if weight is None else weight.reshape(-1)[whole:]
        squares += reference.adamw_step_8bit(tail, *states, grad.reshape(-1)[whole:], out, numbers)
    return squares


@functools.cache
def _tables() -> torch.Tensor:
    """Those of both maps, one after the other."""
    return torch.cat(
        [
            table.view(torch.float32)
            for t in (dynamic8_tables(True), dynamic8_tables(False))
            for table in (t.slope, t.offset, t.carry, t.up, t.base, t.top)
        ]
    )
