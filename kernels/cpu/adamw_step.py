"""AdamW in one pass: the gradient goes in; master weight and moments are updated; the 16-bit weight and the gradient's
sum of squares come out. 28 bytes a parameter with float32 states and a bf16 gradient: 14 read and 14 written, since the
16-bit weight goes past the caches.
"""

from __future__ import annotations

from typing import Any

import torch
from numba import float32

from offload.kernels import reference
from offload.kernels.cpu.helper import helper
from offload.kernels.cpu.lanes import total
from offload.kernels.cpu.memory import (
    claim,
    get_f32,
    get_i64,
    load_bf16,
    load_f32,
    prefetch,
    put_f32,
    store_bf16,
    store_f32,
    stream_bf16,
)
from offload.kernels.cpu.team import TeamFunction, team_function
from offload.kernels.cpu.vector import fma, splat_f32, sqrt
from offload.kernels.reference import AdamW

PIECE = 64 << 10  # parameters that a thread claims; their sum of squares is kept, so that threads change nothing
_STEP = 32  # parameters at a time: a line of bf16
AHEAD = 512  # parameters between those that are fetched and those that are computed


def _make(name: str, load: Any, grad_nbytes: int) -> TeamFunction:
    @helper(inline=True)
    def update(master: int, mean: int, square: int, g: Any, k: int, numbers: Any) -> Any:
        """16 parameters; returns their new values."""
        keep, new1, old2, new2, root, eps, rate = numbers
        m = load_f32(mean, k)
        m = fma(g - m, new1, m)
        v = fma(g * g, new2, load_f32(square, k) * old2)
        p = fma(m / fma(sqrt(v), root, eps), rate, load_f32(master, k) * keep)
        store_f32(mean, k, m)
        store_f32(square, k, v)
        store_f32(master, k, p)
        return p

    @team_function(name)
    def adamw_step(block: int) -> None:
        pieces, count = get_i64(block, 1), get_i64(block, 2)
        master, mean, square = get_i64(block, 3), get_i64(block, 4), get_i64(block, 5)
        grad, weight, numbers, squares = get_i64(block, 6), get_i64(block, 7), get_i64(block, 8), get_i64(block, 9)
        scale, rest = splat_f32(get_f32(numbers, 0)), (
            splat_f32(get_f32(numbers, 1)), splat_f32(get_f32(numbers, 2)), splat_f32(get_f32(numbers, 3)),
            splat_f32(get_f32(numbers, 4)), splat_f32(get_f32(numbers, 5)), splat_f32(get_f32(numbers, 6)),
            splat_f32(get_f32(numbers, 7)),
        )  # fmt: skip
        piece = claim(block)
        while piece < pieces:
            even = odd = splat_f32(float32(0))
            for k in range(piece * PIECE, min(count, (piece + 1) * PIECE), _STEP):
                for stream in (master, mean, square):
                    prefetch(stream + (k + AHEAD) * 4)
                    prefetch(stream + (k + AHEAD) * 4 + 64)
                for line in range(0, _STEP * grad_nbytes, 64):
                    prefetch(grad + (k + AHEAD) * grad_nbytes + line)
                g, h = load(grad, k), load(grad, k + 16)
                even, odd = fma(g, g, even), fma(h, h, odd)
                p = update(master, mean, square, g * scale, k, rest)
                q = update(master, mean, square, h * scale, k + 16, rest)
                if weight % 64 != 0:
                    store_bf16(weight, k, p)
                    store_bf16(weight, k + 16, q)
                elif weight != 0:
                    stream_bf16(weight, k, p, q)
            put_f32(squares, piece, total(even + odd))
            piece = claim(block)  # also orders the streamed stores before whatever this thread does next

    return adamw_step


_FUNCTIONS = {
    dtype: _make(f"adamw_step_{str(dtype)[6:]}", load, dtype.itemsize)
    for dtype, load in ((torch.bfloat16, load_bf16), (torch.float32, load_f32))
}


def refuses(
    master: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    grad: torch.Tensor,
    weight: torch.Tensor | None,
    numbers: AdamW,
) -> str | None:
    """Why `adamw_step` would not take these; None when it does."""
    if grad.dtype not in (torch.bfloat16, torch.float32):
        return f"a gradient in {grad.dtype}"
    if any(t is not None and not t.is_contiguous() for t in (master, exp_avg, exp_avg_sq, grad, weight)):
        return "not contiguous"
    return None


def adamw_step(
    master: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    grad: torch.Tensor,
    weight: torch.Tensor | None,
    numbers: AdamW,
) -> float:
    """See offload.kernels.reference.adamw_step; tensors of any shape, contiguous."""
    count = master.numel()
    whole = count // _STEP * _STEP
    squares = 0.0
    if whole:
        table = constants(numbers)
        sums = torch.empty(-(-whole // PIECE))
        _FUNCTIONS[grad.dtype](
            len(sums), whole, master.data_ptr(), exp_avg.data_ptr(), exp_avg_sq.data_ptr(), grad.data_ptr(),
            0 if weight is None else weight.data_ptr(), table.data_ptr(), sums.data_ptr(),
        )  # fmt: skip
        squares = float(sums.double().sum())
    if whole < count:
        rest = [None if t is None else t.reshape(-1)[whole:] for t in (master, exp_avg, exp_avg_sq, grad, weight)]
        squares += reference.adamw_step(*rest, numbers)  # type: ignore[arg-type]
    return squares


def constants(n: AdamW) -> torch.Tensor:
    """float32 [9]: what a kernel multiplies and adds with."""
    beta1, beta2 = n.betas
    root = (1 - beta2**n.step) ** -0.5
    rate = -n.lr / (1 - beta1**n.step)
    return torch.tensor(
        [n.grad_scale, 1 - n.lr * n.weight_decay, 1 - beta1, beta2, 1 - beta2, root, n.eps, rate, beta1]
    )
