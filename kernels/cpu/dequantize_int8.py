"""A matrix of 8 bits a weight back to bf16 or float32, for products of many rows and for ops that want it whole."""

from __future__ import annotations

from typing import Any

import torch
from numba import float32

from offload.kernels.cpu.linear import step_of
from offload.kernels.cpu.memory import (
    claim,
    get_f32,
    get_i8,
    get_i64,
    load_i8,
    put_bf16,
    put_f32,
    store_bf16,
    store_f32,
)
from offload.kernels.cpu.team import TeamFunction, team_function
from offload.kernels.cpu.vector import splat_f32
from offload.kernels.formats.int8 import Int8Weight


def _make(name: str, store: Any, put: Any) -> TeamFunction:
    @team_function(name)
    def dequantize_int8(block: int) -> None:
        pieces, step, outputs, inputs = get_i64(block, 1), get_i64(block, 2), get_i64(block, 3), get_i64(block, 4)
        q, scales, out = get_i64(block, 5), get_i64(block, 6), get_i64(block, 7)
        piece = claim(block)
        while piece < pieces:
            for n in range(piece * step, min(outputs, (piece + 1) * step)):
                scale, start, whole = float32(get_f32(scales, n)), n * inputs, inputs // 16 * 16
                for k in range(start, start + whole, 16):
                    store(out, k, load_i8(q, k) * splat_f32(scale))
                for k in range(start + whole, start + inputs):
                    put(out, k, get_i8(q, k) * scale)
            piece = claim(block)

    return dequantize_int8


_FUNCTIONS = {
    torch.bfloat16: _make("dequantize_int8_bf16", store_bf16, put_bf16),
    torch.float32: _make("dequantize_int8_f32", store_f32, put_f32),
}


def refuses(weight: Int8Weight, dtype: torch.dtype = torch.float32, out: torch.Tensor | None = None) -> str | None:
    """Why `dequantize_int8` would not take these; None when it does."""
    if dtype not in _FUNCTIONS:
        return f"{dtype}"
    if not weight.q.is_contiguous() or (out is not None and not out.is_contiguous()):
        return "not contiguous"
    return None


def dequantize_int8(
    weight: Int8Weight, dtype: torch.dtype = torch.float32, out: torch.Tensor | None = None
) -> torch.Tensor:
    """See offload.kernels.reference.dequantize_int8; the same bits."""
    outputs, inputs = weight.q.shape
    if out is None:
        out = torch.empty(outputs, inputs, dtype=dtype)
    step = step_of(2 * inputs)
    _FUNCTIONS[dtype](
        -(-outputs // step), step, outputs, inputs, weight.q.data_ptr(), weight.scale.data_ptr(), out.data_ptr()
    )
    return out
