"""y = x W^T + b with W in 4 bits and a scale and an offset for each group of inputs; sums in float32.

With m = 1 + q / 16, which is how four bits read without a conversion (see `_make_dot`), a weight is
scale * q + offset = 16 * scale * m + (offset - 16 * scale). So an output is 16 * sum over groups of scale * sum(x * m),
plus a dot product of one number for each group of the row with the group's sum of x, which all rows share.
"""

from __future__ import annotations

from typing import Any

import torch
from numba import float32, njit, uint32
from torch.nn import functional

from offload.kernels.cpu.dot import make_dot, wide4
from offload.kernels.cpu.linear import step_of
from offload.kernels.cpu.team import TeamFunction, team_function
from offload.kernels.cpu.vector import (
    as_f32,
    claim,
    fma,
    get_f16,
    get_f32,
    get_i64,
    load_f16,
    load_f32,
    load_u32,
    put_f32,
    splat_f32,
    splat_u32,
    total,
)  # fmt: skip
from offload.kernels.formats.int4 import INT4_CHUNK, Int4Weight

MAX_ROWS = 16  # beyond, unpacking once and torch's matrix product cost less

_dot_f16 = make_dot(load_f16, get_f16)


@njit(error_model="numpy")
def _part(words: Any, part: int) -> Any:
    """Weights 16 * part and on of a chunk, as 1 + q / 16."""
    q = words >> splat_u32(uint32(4 * part)) & splat_u32(uint32(15))
    return as_f32(q << splat_u32(uint32(19)) | splat_u32(uint32(0x3F800000)))


def _make(group: int) -> TeamFunction:
    parts = group // 16  # of a chunk's eight that share a scale

    @njit(error_model="numpy")
    def dot4(w: int, w_stride: int, scale: int, scale_stride: int, x: int, count: int) -> Any:
        """Of four rows: the sum over all groups of scale * sum(x * (1 + q / 16))."""
        w1, w2, w3 = w + w_stride, w + 2 * w_stride, w + 3 * w_stride
        s1, s2, s3 = scale + scale_stride, scale + 2 * scale_stride, scale + 3 * scale_stride
        zero = splat_f32(float32(0))
        sums = (zero, zero, zero, zero)
        for start in range(0, count, INT4_CHUNK):
            at = start >> 3
            words = load_u32(w, at), load_u32(w1, at), load_u32(w2, at), load_u32(w3, at)
            for g in range(INT4_CHUNK // group):
                inner = (zero, zero, zero, zero)
                for part in range(g * parts, (g + 1) * parts):
                    four = _part(words[0], part), _part(words[1], part), _part(words[2], part), _part(words[3], part)
                    inner = wide4(four, load_f32(x, start + part * 16), inner)
                k = start // group + g
                sums = (
                    fma(inner[0], splat_f32(get_f16(scale, k)), sums[0]),
                    fma(inner[1], splat_f32(get_f16(s1, k)), sums[1]),
                    fma(inner[2], splat_f32(get_f16(s2, k)), sums[2]),
                    fma(inner[3], splat_f32(get_f16(s3, k)), sums[3]),
                )
        return total(sums[0]), total(sums[1]), total(sums[2]), total(sums[3])

    @njit(error_model="numpy")
    def finish(main: Any, scale: int, offset: int, of_x: int, groups: int) -> Any:
        """An output: what the rows' constants add to the main sum."""
        if offset:
            rest = _dot_f16(offset, of_x, groups) - float32(16) * _dot_f16(scale, of_x, groups)
        else:
            rest = float32(-24) * _dot_f16(scale, of_x, groups)
        return float32(16) * main + rest

    @team_function(f"linear_int4_{group}")
    def linear_int4(block: int) -> None:
        pieces, step = get_i64(block, 1), get_i64(block, 2)
        x, sums, w = get_i64(block, 3), get_i64(block, 4), get_i64(block, 5)
        scale, offset, bias = get_i64(block, 6), get_i64(block, 7), get_i64(block, 8)
        y, rows = get_i64(block, 9), get_i64(block, 10)
        outputs, inputs, groups = get_i64(block, 11), get_i64(block, 12), get_i64(block, 13)
        w_stride, scale_stride = inputs // 2, groups * 2
        piece = claim(block)
        while piece < pieces:
            n, last = piece * step, min(outputs, (piece + 1) * step)
            while n < last:
                many = 4 if n + 4 <= last else 1  # a single one is computed four times over; that is rare
                apart = 1 if many == 4 else 0
                for row in range(rows):
                    a, b, c, d = dot4(
                        w + n * w_stride, apart * w_stride, scale + n * scale_stride, apart * scale_stride,
                        x + row * inputs * 4, inputs,
                    )  # fmt: skip
                    for i in range(many):
                        of_row = (n + i) * scale_stride
                        main = a if i == 0 else b if i == 1 else c if i == 2 else d
                        value = finish(
                            main, scale + of_row, offset + of_row if offset else 0, sums + row * groups * 4, groups
                        )
                        put_f32(y, row * outputs + n + i, value + (get_f32(bias, n + i) if bias else float32(0)))
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
    outputs, groups = weight.scale.shape
    padded = groups * weight.group
    wide = x.reshape(-1, weight.inputs).float()
    if padded != weight.inputs:
        wide = functional.pad(wide, (0, padded - weight.inputs))
    rows = wide.shape[0]
    wide = wide.contiguous()
    sums = wide.view(rows, groups, weight.group).sum(2)
    shift = None if bias is None else bias.float()
    y = torch.empty(*x.shape[:-1], outputs)
    step = step_of(padded // 2)
    _FUNCTIONS[weight.group](
        -(-outputs // step), step, wide.data_ptr(), sums.data_ptr(), weight.packed.data_ptr(), weight.scale.data_ptr(),
        0 if weight.offset is None else weight.offset.data_ptr(), 0 if shift is None else shift.data_ptr(),
        y.data_ptr(), rows, outputs, padded, groups,
    )  # fmt: skip
    return y.to(x.dtype)
