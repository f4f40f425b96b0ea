"""y = x W^T + b with W in 4 bits and a scale and an offset for each group of inputs; sums in float32.

Four bits put where a mantissa begins, under the exponent of 1, read as 1 + q / 16 without a conversion, 32 of them as
16 pairs of bf16. A group's sum starts at minus the sum of x, so that it ends as the sum of x * q / 16 (symmetric: at
minus one and a half, for q - 8); then it is multiplied by the group's scale. Offsets are multiplied by the sums of x.
"""

from __future__ import annotations

from typing import Any

import torch
from numba import float32, int64, njit, uint32
from torch.nn import functional

from offload.kernels.cpu.linear import step_of
from offload.kernels.cpu.split import in_bf16, joined
from offload.kernels.cpu.team import TeamFunction, team_function
from offload.kernels.cpu.vector import (
    claim,
    fma,
    fma_pairs,
    get_f16,
    get_f32,
    get_i64,
    load_bf16,
    load_f16,
    load_f32,
    load_u32,
    load_zipped,
    put_f32,
    splat_f32,
    splat_u32,
    store_f32,
    store_u32,
    total,
)  # fmt: skip
from offload.kernels.formats.int4 import INT4_CHUNK, Int4Weight

MAX_ROWS = 16  # beyond, unpacking once and torch's matrix product cost less


@njit(error_model="numpy")
def _pairs(words: Any, p: int) -> Any:
    """Weights 32 * p and on of a chunk, as 1 + q / 16: pairs of input l and input 16 + l."""
    moved = words << splat_u32(uint32(3)) if p == 0 else words >> splat_u32(uint32(4 * p - 3))
    return moved & splat_u32(uint32(0x00780078)) | splat_u32(uint32(0x3F803F80))


def _make(group: int) -> TeamFunction:
    parts = group // 32  # pairs of vectors that share a scale
    per_chunk = INT4_CHUNK // group

    @njit(error_model="numpy")
    def prepare(x: int, inputs: int, start: float, pairs: int, starts: int, sums: int) -> None:
        """Of a row of bf16: its pairs, where each group's sum starts, and the sum of each group."""
        for g in range(inputs // group):
            of_lanes = splat_f32(float32(0))
            for k in range(g * group, (g + 1) * group, 32):
                store_u32(pairs, k >> 1, load_zipped(x, k))
                of_lanes = of_lanes + (load_bf16(x, k) + load_bf16(x, k + 16))
            store_f32(starts, g * 16, of_lanes * splat_f32(start))
            put_f32(sums, g, total(of_lanes))

    @njit(error_model="numpy")
    def widen_scales(scale: int, stride: int, groups: int, out: int) -> None:
        for n in range(4):
            g = 0
            while g + 16 <= groups:
                store_f32(out, n * groups + g, load_f16(scale + n * stride, g))
                g += 16
            while g < groups:
                put_f32(out, n * groups + g, get_f16(scale + n * stride, g))
                g += 1

    @njit(error_model="numpy")
    def dot4(w: int, stride: int, scales: int, groups: int, x: int, starts: int) -> Any:
        """Of four rows by one of x: 16 lanes of the sum over all groups of scale * sum(x * q / 16)."""
        zero = splat_f32(float32(0))
        a = b = c = d = zero
        w1, w2, w3 = w + stride, w + 2 * stride, w + 3 * stride
        s1, s2, s3 = scales + 4 * groups, scales + 8 * groups, scales + 12 * groups
        for chunk in range(groups // per_chunk):
            at = chunk * 16
            wa, wb, wc, wd = load_u32(w, at), load_u32(w1, at), load_u32(w2, at), load_u32(w3, at)
            for i in range(per_chunk):
                g = chunk * per_chunk + i
                ia = ib = ic = id = load_f32(starts, g * 16)
                for p in range(i * parts, (i + 1) * parts):
                    xp = load_u32(x, (chunk * 4 + p) * 16)
                    ia = fma_pairs(_pairs(wa, p), xp, ia)
                    ib = fma_pairs(_pairs(wb, p), xp, ib)
                    ic = fma_pairs(_pairs(wc, p), xp, ic)
                    id = fma_pairs(_pairs(wd, p), xp, id)
                a = fma(ia, splat_f32(get_f32(scales, g)), a)
                b = fma(ib, splat_f32(get_f32(s1, g)), b)
                c = fma(ic, splat_f32(get_f32(s2, g)), c)
                d = fma(id, splat_f32(get_f32(s3, g)), d)
        return a, b, c, d

    @njit(error_model="numpy")
    def dot8(w: int, stride: int, scales: int, groups: int, x: int, x_stride: int, starts: int, s_stride: int) -> Any:
        """The same of two rows by four of x."""
        zero = splat_f32(float32(0))
        a0 = b0 = c0 = d0 = a1 = b1 = c1 = d1 = zero
        w1, s1 = w + stride, scales + 4 * groups
        xb, xc, xd = x + x_stride, x + 2 * x_stride, x + 3 * x_stride
        tb, tc, td = starts + s_stride, starts + 2 * s_stride, starts + 3 * s_stride
        for chunk in range(groups // per_chunk):
            words0, words1 = load_u32(w, chunk * 16), load_u32(w1, chunk * 16)
            for i in range(per_chunk):
                g = chunk * per_chunk + i
                ia0 = ia1 = load_f32(starts, g * 16)
                ib0 = ib1 = load_f32(tb, g * 16)
                ic0 = ic1 = load_f32(tc, g * 16)
                id0 = id1 = load_f32(td, g * 16)
                for p in range(i * parts, (i + 1) * parts):
                    p0, p1, at = _pairs(words0, p), _pairs(words1, p), (chunk * 4 + p) * 16
                    x0, x1, x2, x3 = load_u32(x, at), load_u32(xb, at), load_u32(xc, at), load_u32(xd, at)
                    ia0, ia1 = fma_pairs(p0, x0, ia0), fma_pairs(p1, x0, ia1)
                    ib0, ib1 = fma_pairs(p0, x1, ib0), fma_pairs(p1, x1, ib1)
                    ic0, ic1 = fma_pairs(p0, x2, ic0), fma_pairs(p1, x2, ic1)
                    id0, id1 = fma_pairs(p0, x3, id0), fma_pairs(p1, x3, id1)
                by0, by1 = splat_f32(get_f32(scales, g)), splat_f32(get_f32(s1, g))
                a0, a1 = fma(ia0, by0, a0), fma(ia1, by1, a1)
                b0, b1 = fma(ib0, by0, b0), fma(ib1, by1, b1)
                c0, c1 = fma(ic0, by0, c0), fma(ic1, by1, c1)
                d0, d1 = fma(id0, by0, d0), fma(id1, by1, d1)
        return (a0, b0, c0, d0), (a1, b1, c1, d1)

    @njit(error_model="numpy")
    def finish(main: Any, offset: int, of_x: int, groups: int) -> Any:
        """An output: 16 lanes of the main sum, and the offsets by the groups' sums of x."""
        wide, rest = main * splat_f32(float32(16)), float32(0)
        if offset:
            g = 0
            while g + 16 <= groups:
                wide = fma(load_f16(offset, g), load_f32(of_x, g), wide)
                g += 16
            while g < groups:
                rest += get_f16(offset, g) * get_f32(of_x, g)
                g += 1
        return total(wide) + rest

    @team_function(f"linear_int4_{group}")
    def linear_int4(block: int) -> None:
        pieces, step = get_i64(block, 1), get_i64(block, 2)
        scratch = get_i64(block, 4) + claim(block + 3 * 8) * get_i64(block, 5)  # this thread's
        x, w, scale, offset = get_i64(block, 6), get_i64(block, 7), get_i64(block, 8), get_i64(block, 9)
        y, rows = get_i64(block, 10), get_i64(block, 11)
        outputs, inputs, groups = get_i64(block, 12), get_i64(block, 13), get_i64(block, 14)
        w_stride, scale_stride = inputs // 2, groups * 2
        starts = scratch + 16 * groups  # behind four rows' scales
        starts = (starts + 63) // 64 * 64
        x_pairs = starts + rows * 64 * groups
        sums = x_pairs + rows * 2 * inputs
        for row in range(rows):
            prepare(
                x + row * 2 * inputs, inputs, float32(-1) if offset else float32(-1.5),
                x_pairs + row * 2 * inputs, starts + row * 64 * groups, sums + row * 4 * groups,
            )  # fmt: skip
        piece = claim(block)
        while piece < pieces:
            n, last = piece * step, min(outputs, (piece + 1) * step)
            while n < last:
                many = 4 if n + 4 <= last else 1  # a single one is computed four times over; that is rare
                apart = 1 if many == 4 else 0
                stride, of_rows, at = apart * w_stride, w + n * w_stride, n * scale_stride
                widen_scales(scale + at, apart * scale_stride, groups, scratch)
                shift = offset + at if offset else int64(0)
                row = int64(0)
                while row + 4 <= rows:
                    for half in range(0, many, 2):
                        pair = dot8(
                            of_rows + half * stride, stride, scratch + half * 4 * groups, groups,
                            x_pairs + row * 2 * inputs, 2 * inputs, starts + row * 64 * groups, 64 * groups,
                        )  # fmt: skip
                        for i in range(2 if many == 4 else 1):
                            quad = pair[0] if i == 0 else pair[1]
                            for r in range(4):
                                main = quad[0] if r == 0 else quad[1] if r == 1 else quad[2] if r == 2 else quad[3]
                                o = half + i
                                value = finish(
                                    main, shift + o * scale_stride if offset else int64(0),
                                    sums + (row + r) * 4 * groups, groups,
                                )  # fmt: skip
                                put_f32(y, (row + r) * outputs + n + o, value)
                    row += 4
                while row < rows:
                    quad = dot4(
                        of_rows, stride, scratch, groups, x_pairs + row * 2 * inputs, starts + row * 64 * groups,
                    )  # fmt: skip
                    for o in range(many):
                        main = quad[0] if o == 0 else quad[1] if o == 1 else quad[2] if o == 2 else quad[3]
                        value = finish(
                            main, shift + o * scale_stride if offset else int64(0), sums + row * 4 * groups, groups
                        )
                        put_f32(y, row * outputs + n + o, value)
                    row += 1
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
    parts = in_bf16(x.reshape(-1, weight.inputs))
    if padded != weight.inputs:
        parts = functional.pad(parts, (0, padded - weight.inputs))
    rows = parts.shape[0]
    y = torch.empty(rows, outputs)
    step = step_of(padded // 2, outputs)
    room = 64 + 16 * groups + rows * (2 * padded + 68 * groups)
    scratch = torch.empty(torch.get_num_threads(), -(-room // 64) * 64, dtype=torch.uint8)
    _FUNCTIONS[weight.group](
        -(-outputs // step), step, 0, scratch.data_ptr(), scratch.shape[1], parts.data_ptr(), weight.packed.data_ptr(),
        weight.scale.data_ptr(), 0 if weight.offset is None else weight.offset.data_ptr(),
        y.data_ptr(), rows, outputs, padded, groups,
    )  # fmt: skip
    return joined(y, x.dtype, bias).view(*x.shape[:-1], outputs)
