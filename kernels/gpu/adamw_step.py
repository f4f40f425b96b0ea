"""AdamW in one pass over device memory: 28 bytes a parameter, and 30 where the 16-bit weight is written too.

Every program keeps the sum of squares of its own gradients; the sums are then added in their order, in float64, so that
the result is the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from offload.kernels.gpu.launch import misplaced, on
from offload.kernels.gpu.numbers import rounded
from offload.kernels.reference import AdamW

BLOCK = 1024  # parameters of a program: 8 for each thread, 16 bytes of bf16


@triton.jit
def _step(
    master, mean, square, grad, weight, squares, count,
    grad_scale, decay, mean_rate, beta2, square_rate, root, eps, rate, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    at = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    raw = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(mean + at, mask=inside, other=0.0)
    v = tl.load(square + at, mask=inside, other=0.0)
    p = tl.load(master + at, mask=inside, other=0.0)
    g = raw * grad_scale
    m += (g - m) * mean_rate
    v = v * beta2 + g * g * square_rate
    p = p * decay + rate * (m / (tl.sqrt(v) * root + eps))
    tl.store(mean + at, m, mask=inside)
    tl.store(square + at, v, mask=inside)
    tl.store(master + at, p, mask=inside)
    if weight is not None:
        tl.store(weight + at, rounded(p, tl.bfloat16), mask=inside)
    tl.store(squares + program, tl.sum(raw * raw))


def refuses(
    master: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    grad: torch.Tensor,
    weight: torch.Tensor | None,
    numbers: AdamW,
) -> str | None:
    """Why `adamw_step` would not take these; None when it does."""
    tensors = [master, exp_avg, exp_avg_sq, grad, *([] if weight is None else [weight])]
    if (why := misplaced(*tensors)) is not None:
        return why
    if grad.dtype not in (torch.bfloat16, torch.float32):
        return f"a gradient in {grad.dtype}"
    if any(state.dtype != torch.float32 for state in tensors[:3]):
        return "states that are not float32"
    if not all(tensor.is_contiguous() for tensor in tensors):
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
    """See offload.kernels.reference.adamw_step; tensors of any shape, contiguous. Waits for the device."""
    return float(enqueue(master, exp_avg, exp_avg_sq, grad, weight, numbers))


def enqueue(
    master: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    grad: torch.Tensor,
    weight: torch.Tensor | None,
    numbers: AdamW,
) -> torch.Tensor:
    """The same without waiting: the sum of squares stays on the device, float64 and without dimensions."""
    count = master.numel()
    squares = torch.empty(triton.cdiv(count, BLOCK), dtype=torch.float32, device=master.device)
    if count:
        with on(master):
            _step[(len(squares),)](
                master, exp_avg, exp_avg_sq, grad, weight, squares, count, *_constants(numbers), BLOCK=BLOCK
            )
    return squares.sum(dtype=torch.float64)


def _constants(n: AdamW) -> list[float]:
    """What `_step` takes, in its order; floats all of them, or Triton would compile anew for a 1."""
    beta1, beta2 = n.betas
    root = (1 - beta2**n.step) ** -0.5
    rate = -n.lr / (1 - beta1**n.step)
    return list(map(float, (n.grad_scale, 1 - n.lr * n.weight_decay, 1 - beta1, beta2, 1 - beta2, root, n.eps, rate)))
