"""A matrix to 8 bits a weight: a row is read for its largest magnitude and then, out of the cache, for its bytes."""

from __future__ import annotations

from typing import Any

import torch
from numba import float32

from offload.kernels.cpu.convert import as_u32
from offload.kernels.cpu.helper import helper
from offload.kernels.cpu.lanes import first, larger, largest
from offload.kernels.cpu.linear import step_of
from offload.kernels.cpu.memory import claim, get_i64, load_bf16, load_f16, load_f32, put_f32, store_u32_low
from offload.kernels.cpu.team import TeamFunction, team_function
from offload.kernels.cpu.vector import magnitude, splat_f32
from offload.kernels.formats.int8 import Int8Weight

_TINY = 2.0**-126  # the smallest normal float32
_ROUND = 1.5 * 2**23  # added to a small float32, it leaves the nearest whole number in the lowest bits


def _make(name: str, load: Any) -> TeamFunction:
    @helper
    def write(w: int, k: int, scale: Any, q: int) -> None:
        store_u32_low(q, k, as_u32(load(w, k) / scale + splat_f32(float32(_ROUND))))

    @team_function(name)
    def quantize_int8(block: int) -> None:
        pieces, step, outputs, inputs = get_i64(block, 1), get_i64(block, 2), get_i64(block, 3), get_i64(block, 4)
        weight, stride, q, scales = get_i64(block, 5), get_i64(block, 6), get_i64(block, 7), get_i64(block, 8)
        piece = claim(block)
        while piece < pieces:
            for n in range(piece * step, min(outputs, (piece + 1) * step)):
                w, out, end = weight + n * stride, q + n * inputs, inputs - 16  # the last 16 may overlap others
                most = magnitude(load(w, end))
                for k in range(0, end, 16):
                    most = larger(most, magnitude(load(w, k)))
                scale = larger(largest(most), splat_f32(float32(_TINY))) / splat_f32(float32(127))
                for k in range(0, end, 16):
                    write(w, k, scale, out)
                write(w, end, scale, out)
                put_f32(scales, n, first(scale))
            piece = claim(block)

    return quantize_int8


_FUNCTIONS = {
    torch.bfloat16: _make("quantize_int8_bf16", load_bf16),
    torch.float16: _make("quantize_int8_f16", load_f16),
    torch.float32: _make("quantize_int8_f32", load_f32),
}


def refuses(weight: torch.Tensor) -> str | None:
    """Why `quantize_int8` would not take this; None when it does."""
    if weight.device.type != "cpu":
        return f"on {weight.device}"
    if weight.dtype not in _FUNCTIONS:
        return f"{weight.dtype}"
    if weight.dim() != 2 or weight.shape[1] < 16:
        return "not a matrix of at least 16 inputs"
    return None if weight.stride(1) == 1 else "rows that do not lie in one piece"


def quantize_int8(weight: torch.Tensor) -> Int8Weight:
    """See offload.kernels.reference.quantize_int8; the same bits for finite weights, and no memory beside them."""
    outputs, inputs = weight.shape
    packed = Int8Weight(torch.empty(outputs, inputs, dtype=torch.int8), torch.empty(outputs))
    step = step_of(inputs * weight.itemsize)
    _FUNCTIONS[weight.dtype](
        -(-outputs // step), step, outputs, inputs, weight.data_ptr(), weight.stride(0) * weight.itemsize,
        packed.q.data_ptr(), packed.scale.data_ptr(),
    )  # fmt: skip
    return packed
