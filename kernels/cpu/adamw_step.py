"""AdamW in one pass: the gradient goes in; master weight and moments are updated; the 16-bit weight and the gradient's
sum of squares come out. 30 bytes a parameter with float32 states and a bf16 gradient: 14 read, 14 written, and 2 that
are fetched because they will be written.
"""

from __future__ import annotations

from typing import Any

import torch
from numba import float32, njit

from offload.kernels import reference
from offload.kernels.cpu.team import TeamFunction, team_function
from offload.kernels.cpu.vector import (
    claim,
    fma,
    get_f32,
    get_i64,
    load_bf16,
    load_f32,
    put_f32,
    splat_f32,
    sqrt,
    store_bf16,
    store_f32,
    total,
)  # fmt: skip
from offload.kernels.reference import AdamW

PIECE = 16 << 10  # parameters that a thread claims; their sum of squares is kept, so that threads change nothing


def _make(name: str, load: Any, writes: bool) -> TeamFunction:
    @njit(error_model="numpy")
    def update(master: int, mean: int, square: int, grad: int, weight: int, k: int, numbers: int) -> Any:
        """16 parameters; returns the squares of their gradients."""
        raw = load(grad, k)
        g = raw * splat_f32(get_f32(numbers, 0))
        m = load_f32(mean, k)
        m = fma(g - m, splat_f32(get_f32(numbers, 2)), m)
        v = fma(g * g, splat_f32(get_f32(numbers, 4)), load_f32(square, k) * splat_f32(get_f32(numbers, 3)))
        bottom = fma(sqrt(v), splat_f32(get_f32(numbers, 5)), splat_f32(get_f32(numbers, 6)))
        p = fma(m / bottom, splat_f32(get_f32(numbers, 7)), load_f32(master, k) * splat_f32(get_f32(numbers, 1)))
        store_f32(mean, k, m)
        store_f32(square, k, v)
        store_f32(master, k, p)
        if writes:
            store_bf16(weight, k, p)
        return raw * raw

    @team_function(name)
    def adamw_step(block: int) -> None:
        pieces, count = get_i64(block, 1), get_i64(block, 2)
        master, mean, square = get_i64(block, 3), get_i64(block, 4), get_i64(block, 5)
        grad, weight, numbers, squares = get_i64(block, 6), get_i64(block, 7), get_i64(block, 8), get_i64(block, 9)
        piece = claim(block)
        while piece < pieces:
            sums = splat_f32(float32(0))
            for k in range(piece * PIECE, min(count, (piece + 1) * PIECE), 16):
                sums = sums + update(master, mean, square, grad, weight, k, numbers)
            put_f32(squares, piece, total(sums))
            piece = claim(block)

    return adamw_step


_FUNCTIONS = {
    (dtype, writes): _make(f"adamw_step_{str(dtype)[6:]}{writes * '_write'}", load, writes)
    for dtype, load in ((torch.bfloat16, load_bf16), (torch.float32, load_f32))
    for writes in (True, False)
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
    whole = count // 16 * 16
    squares = 0.0
    if whole:
        constants = _constants(numbers)
        sums = torch.empty(-(-whole // PIECE), dtype=torch.float32)
        _FUNCTIONS[grad.dtype, weight is not None](
            len(sums), whole, master.data_ptr(), exp_avg.data_ptr(), exp_avg_sq.data_ptr(), grad.data_ptr(),
            0 if weight is None else weight.data_ptr(), constants.data_ptr(), sums.data_ptr(),
        )  # fmt: skip
        squares = float(sums.double().sum())
    if whole < count:
        rest = [None if t is None else t.reshape(-1)[whole:] for t in (master, exp_avg, exp_avg_sq, grad, weight)]
        squares += reference.adamw_step(*rest, numbers)  # type: ignore[arg-type]
    return squares


def _constants(n: AdamW) -> torch.Tensor:
    beta1, beta2 = n.betas
    root = (1 - beta2**n.step) ** -0.5
    rate = -n.lr / (1 - beta1**n.step)
    return torch.tensor([n.grad_scale, 1 - n.lr * n.weight_decay, 1 - beta1, beta2, 1 - beta2, root, n.eps, rate])
