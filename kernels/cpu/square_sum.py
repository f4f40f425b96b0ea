"""The sum of squares, in one pass and with the same bits for any number of threads."""

from __future__ import annotations

from typing import Any

import torch
from numba import float32

from offload.kernels import reference
from offload.kernels.cpu.lanes import total
from offload.kernels.cpu.memory import claim, get_i64, load_bf16, load_f32, put_f32
from offload.kernels.cpu.team import TeamFunction, team_function
from offload.kernels.cpu.vector import fma, splat_f32

PIECE = 64 << 10  # elements that a thread claims; their sum is kept, so that threads change nothing
_STEP = 64


def _make(name: str, load: Any) -> TeamFunction:
    @team_function(name)
    def square_sum(block: int) -> None:
        pieces, count, values, sums = get_i64(block, 1), get_i64(block, 2), get_i64(block, 3), get_i64(block, 4)
        piece = claim(block)
        while piece < pieces:
            a = b = c = d = splat_f32(float32(0))
            for k in range(piece * PIECE, min(count, (piece + 1) * PIECE), _STEP):
                w, x, y, z = load(values, k), load(values, k + 16), load(values, k + 32), load(values, k + 48)
                a, b, c, d = fma(w, w, a), fma(x, x, b), fma(y, y, c), fma(z, z, d)
            put_f32(sums, piece, total((a + b) + (c + d)))
            piece = claim(block)

    return square_sum


_FUNCTIONS = {
    dtype: _make(f"square_sum_{str(dtype)[6:]}", load)
    for dtype, load in ((torch.bfloat16, load_bf16), (torch.float32, load_f32))
}


def refuses(values: torch.Tensor) -> str | None:
    """Why `square_sum` would not take these; None when it does."""
    if values.dtype not in _FUNCTIONS:
        return f"elements in {values.dtype}"
    return None if values.is_contiguous() else "not contiguous"


def square_sum(values: torch.Tensor) -> float:
    """See offload.kernels.reference.square_sum."""
    count = values.numel()
    whole = count // _STEP * _STEP
    found = 0.0
    if whole:
        sums = torch.empty(-(-whole // PIECE))
        _FUNCTIONS[values.dtype](len(sums), whole, values.data_ptr(), sums.data_ptr())
        found = float(sums.double().sum())
    if whole < count:
        found += reference.square_sum(values.reshape(-1)[whole:])
    return found
