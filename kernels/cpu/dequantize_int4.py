"""A matrix of 4 bits a weight back to bf16 or float32, for products of many rows and for ops that want it whole."""

from __future__ import annotations

from typing import Any

import torch
from numba import float32, uint32

from offload.kernels.cpu.convert import as_f32
from offload.kernels.cpu.helper import helper
from offload.kernels.cpu.linear import step_of
from offload.kernels.cpu.memory import claim, get_f16, get_i64, get_u8, load_u32, put_u8, store_bf16, store_f32
from offload.kernels.cpu.team import TeamFunction, team_function
from offload.kernels.cpu.vector import splat_f32, splat_u32
from offload.kernels.formats.int4 import INT4_CHUNK, Int4Weight, first_bit

_first_bit = helper(first_bit)


def _make(name: str, store: Any, itemsize: int) -> TeamFunction:
    @helper
    def unpack(packed: int, parts: int, scale: int, offset: int, out: int) -> None:
        """128 weights."""
        words, first = load_u32(packed, 0), splat_f32(float32(2.0**23))
        for g in range(8 // parts):
            step = get_f16(scale, g)
            low = get_f16(offset, g) if offset else step * float32(-8)
            for part in range(g * parts, (g + 1) * parts):
                nibble = words >> splat_u32(uint32(_first_bit(part))) & splat_u32(uint32(15))
                q = as_f32(nibble | splat_u32(uint32(0x4B000000))) - first  # 2^23 + q, in its lowest bits
                store(out, 16 * part, q * splat_f32(step) + splat_f32(low))

    @team_function(name)
    def dequantize_int4(block: int) -> None:
        pieces, step, outputs, inputs = get_i64(block, 1), get_i64(block, 2), get_i64(block, 3), get_i64(block, 4)
        packed, scales, offsets, parts = get_i64(block, 5), get_i64(block, 6), get_i64(block, 7), get_i64(block, 8)
        result = get_i64(block, 9)
        last = get_i64(block, 11) + claim(block + 10 * 8) * (INT4_CHUNK * itemsize)  # this thread's
        chunks = (inputs + INT4_CHUNK - 1) // INT4_CHUNK
        piece = claim(block)
        while piece < pieces:
            for n in range(piece * step, min(outputs, (piece + 1) * step)):
                for chunk in range(chunks):
                    at, rest = n * chunks + chunk, inputs - chunk * INT4_CHUNK
                    out = result + (n * inputs + chunk * INT4_CHUNK) * itemsize
                    groups = at * (8 // parts) * 2
                    target = out if rest >= INT4_CHUNK else last
                    unpack(packed + at * 64, parts, scales + groups, offsets + groups if offsets else 0, target)
                    if rest < INT4_CHUNK:
                        for byte in range(rest * itemsize):
                            put_u8(out, byte, get_u8(last, byte))
            piece = claim(block)

    return dequantize_int4


_FUNCTIONS = {
    torch.bfloat16: _make("dequantize_int4_bf16", store_bf16, 2),
    torch.float32: _make("dequantize_int4_f32", store_f32, 4),
}


def refuses(weight: Int4Weight, dtype: torch.dtype = torch.float32, out: torch.Tensor | None = None) -> str | None:
    """Why `dequantize_int4` would not take these; None when it does."""
    if dtype not in _FUNCTIONS:
        return f"{dtype}"
    if weight.group not in (32, 64, 128):
        return f"groups of {weight.group}"
    parts = weight.packed, weight.scale, weight.offset, out
    return "not contiguous" if any(part is not None and not part.is_contiguous() for part in parts) else None


def dequantize_int4(
    weight: Int4Weight, dtype: torch.dtype = torch.float32, out: torch.Tensor | None = None
) -> torch.Tensor:
    """See offload.kernels.reference.dequantize_int4; the same bits."""
    outputs, inputs = weight.packed.shape[0], weight.inputs
    if out is None:
        out = torch.empty(outputs, inputs, dtype=dtype)
    last = torch.empty(torch.get_num_threads(), INT4_CHUNK, dtype=dtype)
    step = step_of(2 * inputs)
    _FUNCTIONS[dtype](
        -(-outputs // step), step, outputs, inputs, weight.packed.data_ptr(), weight.scale.data_ptr(),
        0 if weight.offset is None else weight.offset.data_ptr(), weight.group // 16, out.data_ptr(), 0,
        last.data_ptr(),
    )  # fmt: skip
    return out
