"""y = x W^T + b straight from 12 bits a weight: unpacked in registers and multiplied there, by the same sums as plain
bf16 (`dot.py`), so the results are equal bit by bit.
"""

from __future__ import annotations

from typing import Any

import torch
from numba import float32, int64, uint32

from offload.kernels.cpu.convert import as_pairs
from offload.kernels.cpu.helper import helper
from offload.kernels.cpu.lanes import total
from offload.kernels.cpu.linear import MAX_ROWS, step_of
from offload.kernels.cpu.lossless import block_at, clean_until, patched
from offload.kernels.cpu.memory import claim, get_bf16, get_i32, get_i64, load_pairs, put_bf16, scratch, store_u16
from offload.kernels.cpu.several import Call, run
from offload.kernels.cpu.team import TeamFunction, team_function
from offload.kernels.cpu.vector import fma_pairs, splat_f32, splat_u16
from offload.kernels.formats.lossless import LosslessWeight


@helper
def _begin_one(x: int, stride: int, many: int) -> Any:
    """Addresses of one row of x, and its sums."""
    return (x,), (splat_f32(float32(0)),)


@helper(inline=True)
def _one(w: Any, xs: Any, k: int, sums: Any) -> Any:
    """32 weights, from input k on, by one row of x."""
    return (fma_pairs(w, load_pairs(xs[0], k), sums[0]),)


@helper
def _begin_four(x: int, stride: int, many: int) -> Any:
    """The same for four; where there are fewer, the last one again."""
    zero, last = splat_f32(float32(0)), x + (many - 1) * stride
    return (x, min(x + stride, last), min(x + 2 * stride, last), last), (zero, zero, zero, zero)


@helper(inline=True)
def _four(w: Any, xs: Any, k: int, sums: Any) -> Any:
    return (
        fma_pairs(w, load_pairs(xs[0], k), sums[0]),
        fma_pairs(w, load_pairs(xs[1], k), sums[1]),
        fma_pairs(w, load_pairs(xs[2], k), sums[2]),
        fma_pairs(w, load_pairs(xs[3], k), sums[3]),
    )


def _make(name: str, begin: Any, by: Any, at_once: int) -> TeamFunction:
    @helper
    def multiply(
        low: int, codes: int, largest: int, at: int, exponents: int, patch: int, last: int,
        x: int, n: int, many: int, bias: Any, y: int, outputs: int,
    ) -> None:  # fmt: skip
        """One output of `many` rows of x: `y` is the address of the first's, and each has `outputs` of them."""
        xs, sums = begin(x, 2 * n, many)
        top, whole, k, rest = splat_u16(uint32(largest << 7)), n // 64 * 64, int64(0), scratch(128)
        while k < n:
            stop = clean_until(at, patch, last, k, whole)
            while k < stop:
                one, two = block_at(low, codes, top, k)
                sums = by(as_pairs(two), xs, k + 32, by(as_pairs(one), xs, k, sums))
                k += 64
            if k < n:
                one, two = block_at(low, codes, top, k)
                one, two, patch = patched(one, two, at, exponents, patch, last, k)
                if k + 32 <= n:
                    sums = by(as_pairs(one), xs, k, sums)
                if k < whole:
                    sums = by(as_pairs(two), xs, k + 32, sums)
                store_u16(rest, 0, one)
                store_u16(rest, 32, two)
                k += 64
        for r in range(many):
            value = float32(0)
            for k in range(n // 32 * 32, n):
                value = value + get_bf16(rest, k - whole) * get_bf16(xs[r], k)
            put_bf16(y, r * outputs, total(sums[r]) + value + bias)

    @team_function(name)
    def linear_lossless(block: int) -> None:
        pieces, step = get_i64(block, 1), get_i64(block, 2)
        low, codes, largest, starts = get_i64(block, 3), get_i64(block, 4), get_i64(block, 5), get_i64(block, 6)
        at, exponents, x = get_i64(block, 7), get_i64(block, 8), get_i64(block, 9)
        bias, y, many = get_i64(block, 10), get_i64(block, 11), get_i64(block, 12)
        outputs, inputs, padded = get_i64(block, 13), get_i64(block, 14), get_i64(block, 15)
        patches = get_i64(block, 16)
        piece = claim(block)
        while piece < pieces:
            for n in range(piece * step, min(outputs, (piece + 1) * step)):
                first, last = max(get_i32(starts, n), int64(0)), min(get_i32(starts, n + 1), patches)
                added = get_bf16(bias, n) if bias else float32(0)
                row = n * padded
                for r in range(0, many, at_once):
                    multiply(
                        low + row, codes + row // 2, largest, at, exponents, first, last, x + 2 * r * inputs, inputs,
                        min(at_once, many - r), added, y + 2 * (r * outputs + n), outputs,
                    )  # fmt: skip
            piece = claim(block)

    return linear_lossless


_ONE, _MANY = _make("linear_lossless_1", _begin_one, _one, 1), _make("linear_lossless_4", _begin_four, _four, 4)


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
    step, rows = step_of(padded * 3 // 2, outputs), x.numel() // weight.inputs
    arguments = (
        step, weight.low.data_ptr(), weight.codes.data_ptr(), weight.largest,
        weight.patch_start.data_ptr(), weight.patch_input.data_ptr(), weight.patch_exponent.data_ptr(), x.data_ptr(),
        0 if bias is None else bias.data_ptr(), y.data_ptr(), rows, outputs, weight.inputs, padded,
        len(weight.patch_input),
    )  # fmt: skip
    return Call(_ONE if rows == 1 else _MANY, -(-outputs // step), arguments, (), lambda: y)
