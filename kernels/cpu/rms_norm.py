"""RMS norm in one pass: a row is read for its squares and, out of the cache, for its quotients."""

from __future__ import annotations

import struct
from typing import Any

import torch
from numba import float32

from offload.kernels.cpu.convert import through_bf16
from offload.kernels.cpu.helper import helper
from offload.kernels.cpu.lanes import total
from offload.kernels.cpu.linear import step_of
from offload.kernels.cpu.memory import claim, get_bf16, get_f32, get_i64, load_bf16, load_f32, store_bf16, store_f32
from offload.kernels.cpu.team import TeamFunction, team_function
from offload.kernels.cpu.vector import fma, splat_f32, sqrt


def _make(name: str, load: Any, get: Any, store: Any, is_bf16: bool) -> TeamFunction:
    @helper
    def squares(x: int, count: int) -> Any:
        a = b = c = d = splat_f32(float32(0))
        rest, k = float32(0), 0
        while k + 64 <= count:
            v, w, y, z = load(x, k), load(x, k + 16), load(x, k + 32), load(x, k + 48)
            a, b, c, d = fma(v, v, a), fma(w, w, b), fma(y, y, c), fma(z, z, d)
            k += 64
        while k < count:
            rest += get(x, k) * get(x, k)
            k += 1
        return total((a + b) + (c + d)) + rest

    @helper
    def write(x: int, by: Any, weight: int, out: int, k: int) -> None:
        value = load(x, k) * by
        if is_bf16:
            value = through_bf16(value)
        store(out, k, value * load(weight, k))

    @team_function(name)
    def rms_norm(block: int) -> None:
        pieces, step, rows, hidden = get_i64(block, 1), get_i64(block, 2), get_i64(block, 3), get_i64(block, 4)
        x, weight, out, eps = get_i64(block, 5), get_i64(block, 6), get_i64(block, 7), get_f32(block + 8 * 8, 0)
        stride, one = hidden * (2 if is_bf16 else 4), splat_f32(float32(1))
        piece = claim(block)
        while piece < pieces:
            for row in range(piece * step, min(rows, (piece + 1) * step)):
                source, target, end = x + row * stride, out + row * stride, hidden - 16
                by = one / sqrt(splat_f32(squares(source, hidden) / float32(hidden) + eps))
                for k in range(0, end, 16):
                    write(source, by, weight, target, k)
                write(source, by, weight, target, end)  # may overlap others
            piece = claim(block)

    return rms_norm


_FUNCTIONS = {
    torch.bfloat16: _make("rms_norm_bf16", load_bf16, get_bf16, store_bf16, True),
    torch.float32: _make("rms_norm_f32", load_f32, get_f32, store_f32, False),
}


def refuses(x: torch.Tensor, weight: torch.Tensor, eps: float) -> str | None:
    """Why `rms_norm` would not take these; None when it does."""
    if x.device.type != "cpu":
        return f"on {x.device}"
    if x.dtype not in _FUNCTIONS or weight.dtype != x.dtype:
        return f"{x.dtype} by {weight.dtype}"
    if x.shape[-1] < 16 or x.numel() == 0:
        return f"{x.shape[-1]} numbers a row, fewer than 16, or no row"
    return None if x.is_contiguous() and weight.is_contiguous() else "not contiguous"


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See offload.kernels.reference.rms_norm."""
    hidden, out = x.shape[-1], torch.empty_like(x)
    rows, step = x.numel() // hidden, step_of(hidden * x.itemsize)
    (number,) = struct.unpack("<q", struct.pack("<ff", eps, 0.0))
    _FUNCTIONS[x.dtype](-(-rows // step), step, rows, hidden, x.data_ptr(), weight.data_ptr(), out.data_ptr(), number)
    return out
