"""y = x W^T + b with W in 4 bits and a scale and an offset for each group of inputs; sums in float32.

Four bits put where a mantissa begins, under the exponent of 1, read as m = 1 + q / 16 without a conversion, 32 of them
as 16 pairs of bf16. A weight is scale * q + offset = 16 * scale * m + (offset - 16 * scale). So an output is the sum
over groups of 16 * scale * sum(x * m), and of (offset - 16 * scale) * sum(x), where sum(x) is the same for all outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from numba import float32, int64, uint32
from torch.nn import functional

from offload.kernels.cpu.ahead import ask
from offload.kernels.cpu.helper import helper
from offload.kernels.cpu.lanes import total
from offload.kernels.cpu.linear import step_of
from offload.kernels.cpu.memory import (
    claim,
    get_f16,
    get_f32,
    get_i64,
    load_bf16,
    load_f16,
    load_f32,
    load_u32,
    load_zipped,
    put_f32,
    store_f32,
    store_u32,
)
from offload.kernels.cpu.several import Call, run
from offload.kernels.cpu.split import in_bf16, joined
from offload.kernels.cpu.team import TeamFunction, team_function
from offload.kernels.cpu.vector import fma, fma_pairs, splat_f32, splat_u32
from offload.kernels.formats.int4 import INT4_CHUNK, Int4Weight

MAX_ROWS = 16  # beyond, unpacking once and torch's matrix product cost less


@helper
def _pairs(words: Any, p: int) -> Any:
    """Weights 32 * p and on of a chunk, as 1 + q / 16: pairs of input l and input 16 + l."""
    moved = words << splat_u32(uint32(3)) if p == 0 else words >> splat_u32(uint32(4 * p - 3))
    return moved & splat_u32(uint32(0x00780078)) | splat_u32(uint32(0x3F803F80))


@helper
def _prepare_x(x: int, inputs: int, group: int, pairs: int, sums: int) -> None:
    """Of a row of bf16: its numbers in pairs as the weights are, and the sum of each group."""
    for g in range(inputs // group):
        of_lanes = splat_f32(float32(0))
        for k in range(g * group, (g + 1) * group, 32):
            store_u32(pairs, k >> 1, load_zipped(x, k))
            of_lanes = of_lanes + (load_bf16(x, k) + load_bf16(x, k + 16))
        put_f32(sums, g, total(of_lanes))


@helper
def _prepare_scales(scale: int, offset: int, groups: int, steps: int, shifts: int) -> None:
    """Of a row: 16 * scale and offset - 16 * scale of each group, as float32."""
    g = 0
    while g + 16 <= groups:
        step = load_f16(scale, g) * splat_f32(float32(16))
        low = load_f16(offset, g) if offset else step * splat_f32(float32(-0.5))
        store_f32(steps, g, step)
        store_f32(shifts, g, low - step)
        g += 16
    while g < groups:
        one = get_f16(scale, g) * float32(16)
        put_f32(steps, g, one)
        put_f32(shifts, g, (get_f16(offset, g) if offset else one * float32(-0.5)) - one)
        g += 1


@helper
def _finish(main: Any, shifts: int, sums: int, groups: int) -> Any:
    """An output: 16 lanes of the first sum, plus the second."""
    g, rest = 0, float32(0)
    while g + 16 <= groups:
        main = fma(load_f32(shifts, g), load_f32(sums, g), main)
        g += 16
    while g < groups:
        rest += get_f32(shifts, g) * get_f32(sums, g)
        g += 1
    return total(main) + rest


def _make(group: int) -> TeamFunction:
    parts = group // 32  # vectors of pairs that share a scale
    per_chunk = INT4_CHUNK // group

    @helper
    def four(words: Any, chunk: int, i: int, x: int) -> Any:
        """Of group i of a chunk of four rows, by one row of x: 16 lanes each of sum(x * m)."""
        a = b = c = d = splat_f32(float32(0))
        for p in range(i * parts, (i + 1) * parts):
            by = load_u32(x, (chunk * 4 + p) * 16)
            a, b = fma_pairs(_pairs(words[0], p), by, a), fma_pairs(_pairs(words[1], p), by, b)
            c, d = fma_pairs(_pairs(words[2], p), by, c), fma_pairs(_pairs(words[3], p), by, d)
        return a, b, c, d

    @helper
    def scaled(inner: Any, steps: int, groups: int, g: int, sums: Any) -> Any:
        return (
            fma(inner[0], splat_f32(get_f32(steps, g)), sums[0]),
            fma(inner[1], splat_f32(get_f32(steps, groups + g)), sums[1]),
            fma(inner[2], splat_f32(get_f32(steps, 2 * groups + g)), sums[2]),
            fma(inner[3], splat_f32(get_f32(steps, 3 * groups + g)), sums[3]),
        )

    @helper
    def words4(w: int, stride: int, chunk: int) -> Any:
        ask(w + chunk * 256, 256)
        at = chunk * 16
        return (
            load_u32(w, at),
            load_u32(w + stride, at),
            load_u32(w + 2 * stride, at),
            load_u32(w + 3 * stride, at),
        )

    @helper
    def dot4(w: int, stride: int, steps: int, groups: int, x: int) -> Any:
        """Four rows by one of x: 16 lanes of each first sum."""
        zero = splat_f32(float32(0))
        sums = (zero, zero, zero, zero)
        for chunk in range(groups // per_chunk):
            words = words4(w, stride, chunk)
            for i in range(per_chunk):
                sums = scaled(four(words, chunk, i, x), steps, groups, chunk * per_chunk + i, sums)
        return sums

    @helper
    def dot8(w: int, stride: int, steps: int, groups: int, x: int, next_x: int) -> Any:
        """Four rows by two of x."""
        zero = splat_f32(float32(0))
        sums = more = (zero, zero, zero, zero)
        for chunk in range(groups // per_chunk):
            words = words4(w, stride, chunk)
            for i in range(per_chunk):
                g = chunk * per_chunk + i
                sums = scaled(four(words, chunk, i, x), steps, groups, g, sums)
                more = scaled(four(words, chunk, i, next_x), steps, groups, g, more)
        return sums, more

    @helper
    def write4(y: int, at: int, many: int, sums: Any, shifts: int, of_x: int, groups: int) -> None:
        put_f32(y, at, _finish(sums[0], shifts, of_x, groups))
        if many == 4:
            put_f32(y, at + 1, _finish(sums[1], shifts + 4 * groups, of_x, groups))
            put_f32(y, at + 2, _finish(sums[2], shifts + 8 * groups, of_x, groups))
            put_f32(y, at + 3, _finish(sums[3], shifts + 12 * groups, of_x, groups))

    @team_function(f"linear_int4_{group}")
    def linear_int4(block: int) -> None:
        pieces, step = get_i64(block, 1), get_i64(block, 2)
        x_pairs = get_i64(block, 4) + claim(block + 3 * 8) * get_i64(block, 5)  # this thread's memory
        x, w, scale, offset = get_i64(block, 6), get_i64(block, 7), get_i64(block, 8), get_i64(block, 9)
        y, rows = get_i64(block, 10), get_i64(block, 11)
        outputs, inputs, groups = get_i64(block, 12), get_i64(block, 13), get_i64(block, 14)
        x_nbytes, w_nbytes = 2 * inputs, inputs // 2
        of_x = x_pairs + rows * x_nbytes
        steps = of_x + rows * 4 * groups
        shifts = steps + 16 * groups
        for row in range(rows):
            _prepare_x(x + row * x_nbytes, inputs, group, x_pairs + row * x_nbytes, of_x + row * 4 * groups)
        piece = claim(block)
        while piece < pieces:
            n, last = piece * step, min(outputs, (piece + 1) * step)
            while n < last:
                many = 4 if n + 4 <= last else 1  # a single one is computed four times over; that is rare
                first, stride = w + n * w_nbytes, w_nbytes if many == 4 else int64(0)
                ask(scale + n * 2 * groups, 8 * groups)
                for i in range(4):
                    at = (n + min(i, many - 1)) * 2 * groups
                    _prepare_scales(
                        scale + at, offset + at if offset else int64(0), groups,
                        steps + i * 4 * groups, shifts + i * 4 * groups,
                    )  # fmt: skip
                row = int64(0)
                while row + 2 <= rows:
                    xs, sums = x_pairs + row * x_nbytes, of_x + row * 4 * groups
                    pair = dot8(first, stride, steps, groups, xs, xs + x_nbytes)
                    write4(y, row * outputs + n, many, pair[0], shifts, sums, groups)
                    write4(y, (row + 1) * outputs + n, many, pair[1], shifts, sums + 4 * groups, groups)
                    row += 2
                if row < rows:
                    xs, sums = x_pairs + row * x_nbytes, of_x + row * 4 * groups
                    write4(y, row * outputs + n, many, dot4(first, stride, steps, groups, xs), shifts, sums, groups)
                n += many
            piece = claim(block)

    return linear_int4


_FUNCTIONS = {group: _make(group) for group in (32, 64, 128)}


def refuses(x: torch.Tensor, weight: Int4Weight, bias: torch.Tensor | None = None) -> str | None:
    """Why `linear_int4` would not take these; None when it does."""
    if x.device.type != "cpu":
        return f"on {x.device}"
    if weight.group not in _FUNCTIONS:
        return f"groups of {weight.group}"
    if x.shape[-1] == 0 or not 0 < x.numel() // x.shape[-1] <= MAX_ROWS:
        return f"more than {MAX_ROWS} rows, or none"
    return None


def linear_int4(x: torch.Tensor, weight: Int4Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """See offload.kernels.reference.linear_int4; at most MAX_ROWS rows of x."""
    return run([plan(x, weight, bias)])[0]


def plan(x: torch.Tensor, weight: Int4Weight, bias: torch.Tensor | None = None) -> Call:
    """That product, to be run with others."""
    outputs, groups = weight.scale.shape
    padded = groups * weight.group
    parts = in_bf16(x.reshape(-1, weight.inputs))
    if padded != weight.inputs:
        parts = functional.pad(parts, (0, padded - weight.inputs))
    rows = parts.shape[0]
    y = torch.empty(rows, outputs)
    step = step_of(padded // 2, outputs)
    room = rows * (2 * padded + 4 * groups) + 32 * groups
    scratch = torch.empty(torch.get_num_threads(), -(-room // 64) * 64, dtype=torch.uint8)
    arguments = (
        step, 0, scratch.data_ptr(), scratch.shape[1], parts.data_ptr(), weight.packed.data_ptr(),
        weight.scale.data_ptr(), 0 if weight.offset is None else weight.offset.data_ptr(),
        y.data_ptr(), rows, outputs, padded, groups,
    )  # fmt: skip
    shape = *x.shape[:-1], outputs
    return Call(
        _FUNCTIONS[weight.group], -(-outputs // step), arguments, (parts, scratch),
        lambda: joined(y, x.dtype, bias).view(shape),
    )  # fmt: skip
