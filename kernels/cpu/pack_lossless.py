"""A bf16 matrix to 12 bits a weight in three passes: the largest exponent; both planes; rare exponents as patches."""

from __future__ import annotations

from typing import Any

import torch
from numba import uint32

from offload.kernels.cpu.helper import helper
from offload.kernels.cpu.lanes import count_bits, equal, first, larger, largest, lowest_bit, smaller
from offload.kernels.cpu.linear import step_of
from offload.kernels.cpu.memory import (
    claim,
    get_i32,
    get_i64,
    get_u16,
    load_u16,
    load_u16_low,
    put_i32,
    put_u8,
    put_u16,
    store_u16_low,
)
from offload.kernels.cpu.team import team_function
from offload.kernels.cpu.vector import splat_u16
from offload.kernels.formats.lossless import LOSSLESS_BLOCK, LosslessWeight


@team_function("largest_exponent")
def _largest(block: int) -> None:
    pieces, step, outputs, inputs = get_i64(block, 1), get_i64(block, 2), get_i64(block, 3), get_i64(block, 4)
    weight, stride, found = get_i64(block, 5), get_i64(block, 6), get_i64(block, 7)
    piece = claim(block)
    while piece < pieces:
        wide, rest = splat_u16(uint32(0)), uint32(0)
        for n in range(piece * step, min(outputs, (piece + 1) * step)):
            w, whole = weight + n * stride, inputs // 32 * 32
            for k in range(0, whole, 32):
                wide = larger(wide, load_u16(w, k) << splat_u16(uint32(1)))  # without the sign
            for k in range(whole, inputs):
                rest = max(rest, get_u16(w, k) & uint32(0x7FFF))
        put_i32(found, piece, max(rest >> uint32(7), first(largest(wide)) >> uint32(8)))
        piece = claim(block)


@helper
def _split(bits: Any, top: Any) -> Any:
    """32 bf16 as (sign and mantissa, exponent code)."""
    low = bits >> splat_u16(uint32(8)) & splat_u16(uint32(0x80)) | bits & splat_u16(uint32(0x7F))
    exponent = bits >> splat_u16(uint32(7)) & splat_u16(uint32(0xFF))
    return low, smaller(top - exponent, splat_u16(uint32(15)))


@helper
def _pack(w: int, low: int, codes: int, top: Any) -> Any:
    """64 bf16; returns how many need a patch."""
    low1, code1 = _split(load_u16(w, 0), top)
    low2, code2 = _split(load_u16(w, 32), top)
    store_u16_low(low, 0, low1)
    store_u16_low(low, 32, low2)
    store_u16_low(codes, 0, code1 | code2 << splat_u16(uint32(4)))
    return count_bits(equal(code1, splat_u16(uint32(15)))) + count_bits(equal(code2, splat_u16(uint32(15))))


@team_function("pack_lossless")
def _planes(block: int) -> None:
    pieces, step, outputs, inputs = get_i64(block, 1), get_i64(block, 2), get_i64(block, 3), get_i64(block, 4)
    weight, stride, low, codes = get_i64(block, 5), get_i64(block, 6), get_i64(block, 7), get_i64(block, 8)
    top, counts, padded = splat_u16(uint32(get_i64(block, 9))), get_i64(block, 10), get_i64(block, 11)
    last = get_i64(block, 13) + claim(block + 12 * 8) * (2 * LOSSLESS_BLOCK)  # this thread's, of code 0
    piece = claim(block)
    while piece < pieces:
        for n in range(piece * step, min(outputs, (piece + 1) * step)):
            w, out, whole, count = weight + n * stride, n * padded, inputs // 64 * 64, 0
            for k in range(0, whole, 64):
                count += _pack(w + 2 * k, low + out + k, codes + (out + k) // 2, top)
            if whole < inputs:
                for k in range(whole, inputs):
                    put_u16(last, k - whole, get_u16(w, k))
                count += _pack(last, low + out + whole, codes + (out + whole) // 2, top)
            put_i32(counts, n, count)
        piece = claim(block)


@helper
def _write(mask: int, k: int, w: int, at: int, exponents: int, patch: int) -> int:
    """The patches of inputs `k` and on that `mask` names; returns where the next one goes."""
    while mask:
        j = k + lowest_bit(mask)
        put_i32(at, patch, j)
        put_u8(exponents, patch, get_u16(w, j) >> uint32(7))
        mask &= mask - 1
        patch += 1
    return patch


@team_function("pack_lossless_patches")
def _patches(block: int) -> None:
    pieces, step, outputs = get_i64(block, 1), get_i64(block, 2), get_i64(block, 3)
    weight, stride, codes, padded = get_i64(block, 4), get_i64(block, 5), get_i64(block, 6), get_i64(block, 7)
    starts, at, exponents = get_i64(block, 8), get_i64(block, 9), get_i64(block, 10)
    low, high = splat_u16(uint32(15)), splat_u16(uint32(0xF0))
    piece = claim(block)
    while piece < pieces:
        for n in range(piece * step, min(outputs, (piece + 1) * step)):
            patch, end, k = get_i32(starts, n), get_i32(starts, n + 1), 0
            while patch < end:
                pair = load_u16_low(codes + n * padded // 2, k // 2)
                patch = _write(equal(pair & low, low), k, weight + n * stride, at, exponents, patch)
                patch = _write(equal(pair & high, high), k + 32, weight + n * stride, at, exponents, patch)
                k += 64
        piece = claim(block)


def largest_exponent(weight: torch.Tensor) -> int:
    """The largest exponent of a bfloat16 matrix that `refuses` takes; of several parts, the largest is the whole's."""
    outputs, inputs = weight.shape
    step = step_of(2 * inputs)
    found = torch.empty(-(-outputs // step), dtype=torch.int32)
    _largest(len(found), step, outputs, inputs, weight.data_ptr(), 2 * weight.stride(0), found.data_ptr())
    return int(found.max())


def refuses(
    weight: torch.Tensor, largest: int | None = None, planes: tuple[torch.Tensor, torch.Tensor] | None = None
) -> str | None:
    """Why `pack_lossless` would not take these; None when it does."""
    if weight.device.type != "cpu":
        return f"on {weight.device}"
    if weight.dtype != torch.bfloat16:
        return f"{weight.dtype}"
    if weight.dim() != 2 or weight.numel() == 0:
        return "not a matrix"
    return None if weight.stride(1) == 1 else "rows that do not lie in one piece"


def pack_lossless(
    weight: torch.Tensor, largest: int | None = None, planes: tuple[torch.Tensor, torch.Tensor] | None = None
) -> LosslessWeight:
    """See offload.kernels.reference.pack_lossless; the same bits. Beside the result, 8 bytes an output."""
    outputs, inputs = weight.shape
    largest = largest_exponent(weight) if largest is None else largest
    padded = -(-inputs // LOSSLESS_BLOCK) * LOSSLESS_BLOCK
    low, codes = planes or (
        torch.empty(outputs, padded, dtype=torch.uint8),
        torch.empty(outputs, padded // 2, dtype=torch.uint8),
    )
    assert low.is_contiguous(), "planes are written as one piece"
    assert codes.is_contiguous(), "planes are written as one piece"
    assert (low.shape, codes.shape) == ((outputs, padded), (outputs, padded // 2)), (low.shape, codes.shape)
    start = torch.zeros(outputs + 1, dtype=torch.int32)
    last = torch.full((torch.get_num_threads(), LOSSLESS_BLOCK), largest << 7, dtype=torch.int16)
    step, stride = step_of(2 * inputs), 2 * weight.stride(0)
    pieces = -(-outputs // step)
    _planes(
        pieces, step, outputs, inputs, weight.data_ptr(), stride, low.data_ptr(), codes.data_ptr(), largest,
        start[1:].data_ptr(), padded, 0, last.data_ptr(),
    )  # fmt: skip
    patches = int(start.cumsum_(0)[-1])
    at, exponents = torch.empty(patches, dtype=torch.int32), torch.empty(patches, dtype=torch.uint8)
    if patches:
        _patches(
            pieces, step, outputs, weight.data_ptr(), stride, codes.data_ptr(), padded, start.data_ptr(), at.data_ptr(),
            exponents.data_ptr(),
        )  # fmt: skip
    return LosslessWeight(low, codes, largest, start, at, exponents, inputs)
