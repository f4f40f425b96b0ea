"""A matrix to 4 bits a weight: a group's range, then its quotients, while 128 inputs lie in the first cache."""

from __future__ import annotations

from typing import Any

import torch
from numba import float32, uint32

from offload.kernels.cpu.convert import as_f32, as_u32, through_f16
from offload.kernels.cpu.helper import helper
from offload.kernels.cpu.lanes import first, lane_numbers, larger, largest, smaller, smallest, where_equal
from offload.kernels.cpu.linear import step_of
from offload.kernels.cpu.memory import claim, get_i64, get_u8, load_bf16, load_f16, load_f32, put_f16, put_u8, store_u32
from offload.kernels.cpu.team import TeamFunction, team_function
from offload.kernels.cpu.vector import magnitude, splat_f32, splat_u32
from offload.kernels.formats.int4 import INT4_CHUNK, Int4Weight, first_bit

_ROUND = 2.0**23  # added to a small float32, it leaves the nearest whole number in the lowest bits

_first_bit = helper(first_bit)


def _make(name: str, load: Any, itemsize: int) -> TeamFunction:
    @helper
    def spread(w: int, at: int, parts: int) -> Any:
        """Asymmetric: (step, lowest) of a group of 16 * parts weights, in every lane."""
        low = high = load(w, at)
        for k in range(at + 16, at + 16 * parts, 16):
            low, high = smaller(low, load(w, k)), larger(high, load(w, k))
        low, high = smallest(low), largest(high)
        # zero is added so that a lowest of zero has one sign, in whatever order they are compared
        return through_f16((high - low) / splat_f32(float32(15))), through_f16(low) + splat_f32(float32(0))

    @helper
    def extreme(w: int, at: int, parts: int) -> Any:
        """Symmetric: (step, -8 steps), where the first weight of the largest magnitude is near -8 steps."""
        most = splat_f32(float32(0))
        for k in range(at, at + 16 * parts, 16):
            most = larger(most, magnitude(load(w, k)))
        most = largest(most)
        key = splat_u32(uint32(0))  # of those as large: twice the distance to the end, and the sign
        for k in range(at, at + 16 * parts, 16):
            value = load(w, k)
            place = splat_u32(uint32(at + 128 - k)) - lane_numbers()
            mine = place << splat_u32(uint32(1)) | as_u32(value) >> splat_u32(uint32(31))
            key = larger(key, where_equal(magnitude(value), most, mine, splat_u32(uint32(0))))
        signed = as_f32(as_u32(most) | largest(key) << splat_u32(uint32(31)))
        step = through_f16(signed / splat_f32(float32(-8)))
        return step, step * splat_f32(float32(-8))

    @helper
    def pack(w: int, parts: int, packed: int, scale: int, offset: int) -> None:
        """128 weights: 64 bytes, and a scale and an offset (if its address is not 0) for each group."""
        zero, fifteen, words = splat_f32(float32(0)), splat_f32(float32(15)), splat_u32(uint32(0))
        for g in range(8 // parts):
            step, low = spread(w, 16 * g * parts, parts) if offset else extreme(w, 16 * g * parts, parts)
            put_f16(scale, g, first(step))
            if offset:
                put_f16(offset, g, first(low))
            step = where_equal(step, zero, splat_f32(float32(1)), step)
            for part in range(g * parts, (g + 1) * parts):
                q = smaller(larger((load(w, 16 * part) - low) / step, zero), fifteen)
                bits = as_u32(q + splat_f32(float32(_ROUND))) & splat_u32(uint32(15))
                words = words | bits << splat_u32(uint32(_first_bit(part)))
        store_u32(packed, 0, words)

    @team_function(name)
    def quantize_int4(block: int) -> None:
        pieces, step, outputs, inputs = get_i64(block, 1), get_i64(block, 2), get_i64(block, 3), get_i64(block, 4)
        weight, stride, packed = get_i64(block, 5), get_i64(block, 6), get_i64(block, 7)
        scales, offsets, parts = get_i64(block, 8), get_i64(block, 9), get_i64(block, 10)
        last = get_i64(block, 12) + claim(block + 11 * 8) * (INT4_CHUNK * itemsize)  # this thread's, full of zeros
        chunks = (inputs + INT4_CHUNK - 1) // INT4_CHUNK
        piece = claim(block)
        while piece < pieces:
            for n in range(piece * step, min(outputs, (piece + 1) * step)):
                for chunk in range(chunks):
                    w = weight + n * stride + chunk * (INT4_CHUNK * itemsize)
                    rest = inputs - chunk * INT4_CHUNK
                    if rest < INT4_CHUNK:
                        for byte in range(rest * itemsize):
                            put_u8(last, byte, get_u8(w, byte))
                        w = last
                    at = n * chunks + chunk
                    groups = at * (8 // parts) * 2
                    pack(w, parts, packed + at * 64, scales + groups, offsets + groups if offsets else 0)
            piece = claim(block)

    return quantize_int4


_FUNCTIONS = {
    torch.bfloat16: _make("quantize_int4_bf16", load_bf16, 2),
    torch.float16: _make("quantize_int4_f16", load_f16, 2),
    torch.float32: _make("quantize_int4_f32", load_f32, 4),
}


def refuses(weight: torch.Tensor, group: int = 32, symmetric: bool = False) -> str | None:
    """Why `quantize_int4` would not take these; None when it does."""
    if weight.device.type != "cpu":
        return f"on {weight.device}"
    if weight.dtype not in _FUNCTIONS:
        return f"{weight.dtype}"
    if group not in (32, 64, 128):
        return f"groups of {group}"
    if weight.dim() != 2 or weight.numel() == 0:
        return "not a matrix"
    return None if weight.stride(1) == 1 else "rows that do not lie in one piece"


def quantize_int4(weight: torch.Tensor, group: int = 32, symmetric: bool = False) -> Int4Weight:
    """See offload.kernels.reference.quantize_int4; the same bits for finite weights, and no memory beside them."""
    outputs, inputs = weight.shape
    chunks = -(-inputs // INT4_CHUNK)
    packed = torch.empty(outputs, chunks * INT4_CHUNK // 2, dtype=torch.uint8)
    scale = torch.empty(outputs, chunks * INT4_CHUNK // group, dtype=torch.float16)
    offset = None if symmetric else torch.empty_like(scale)
    last = torch.zeros(torch.get_num_threads(), INT4_CHUNK, dtype=weight.dtype)
    step = step_of(inputs * weight.itemsize)
    _FUNCTIONS[weight.dtype](
        -(-outputs // step), step, outputs, inputs, weight.data_ptr(), weight.stride(0) * weight.itemsize,
        packed.data_ptr(), scale.data_ptr(), 0 if offset is None else offset.data_ptr(), group // 16, 0,
        last.data_ptr(),
    )  # fmt: skip
    return Int4Weight(packed, scale, offset, inputs, group)
