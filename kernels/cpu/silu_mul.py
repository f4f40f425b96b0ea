"""silu(gate) * up in one pass: both are read once, and the product written once."""

from __future__ import annotations

from typing import Any

import torch
from numba import float32

from offload.kernels.cpu.convert import through_bf16
from offload.kernels.cpu.exp import LOG2_E, exp2
from offload.kernels.cpu.helper import helper
from offload.kernels.cpu.lanes import where_less
from offload.kernels.cpu.memory import claim, get_i64, load_bf16, load_f32, store_bf16, store_f32
from offload.kernels.cpu.team import TeamFunction, team_function
from offload.kernels.cpu.vector import magnitude, splat_f32

_STEP = 1 << 15  # numbers that a thread claims


def _make(name: str, load: Any, store: Any, is_bf16: bool) -> TeamFunction:
    @helper
    def write(gate: int, up: int, out: int, k: int) -> None:
        x, one, zero = load(gate, k), splat_f32(float32(1)), splat_f32(float32(0))
        t = exp2(magnitude(x) * splat_f32(float32(-LOG2_E)))  # at most 1, whatever the sign of x
        value = x * where_less(x, zero, t, one) / (one + t)
        if is_bf16:
            value = through_bf16(value)
        store(out, k, value * load(up, k))

    @team_function(name)
    def silu_mul(block: int) -> None:
        pieces, count = get_i64(block, 1), get_i64(block, 2)
        gate, up, out = get_i64(block, 3), get_i64(block, 4), get_i64(block, 5)
        piece = claim(block)
        while piece < pieces:
            end = min(count, (piece + 1) * _STEP)
            for k in range(piece * _STEP, end - 15, 16):
                write(gate, up, out, k)
            write(gate, up, out, end - 16)  # may overlap others
            piece = claim(block)

    return silu_mul


_FUNCTIONS = {
    torch.bfloat16: _make("silu_mul_bf16", load_bf16, store_bf16, True),
    torch.float32: _make("silu_mul_f32", load_f32, store_f32, False),
}


def refuses(gate: torch.Tensor, up: torch.Tensor) -> str | None:
    """Why `silu_mul` would not take these; None when it does."""
    if gate.device.type != "cpu":
        return f"on {gate.device}"
    if gate.dtype not in _FUNCTIONS or up.dtype != gate.dtype:
        return f"{gate.dtype} by {up.dtype}"
    if gate.shape != up.shape or gate.numel() < 16:
        return f"shapes {tuple(gate.shape)} and {tuple(up.shape)}"
    return None if gate.is_contiguous() and up.is_contiguous() else "not contiguous"


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """See offload.kernels.reference.silu_mul."""
    out, count = torch.empty_like(gate), gate.numel()
    _FUNCTIONS[gate.dtype](-(-count // _STEP), count, gate.data_ptr(), up.data_ptr(), out.data_ptr())
    return out
