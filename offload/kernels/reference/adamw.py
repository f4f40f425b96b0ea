"""One step of AdamW, with moments in float32 or in 8 bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from offload.kernels.formats.dynamic8 import Dynamic8, dequantize_dynamic8, quantize_dynamic8


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """The numbers of one AdamW step (Loshchilov and Hutter, 2019), in torch's names.

    Attributes:
        step: which step this is, from 1.
        grad_scale: every gradient is multiplied by it first: a clip factor, or one over a loss scale.
    """

    lr: float
    step: int
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    grad_scale: float = 1.0


def adamw_step(
    master: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    grad: torch.Tensor,
    weight: torch.Tensor | None,
    numbers: AdamW,
) -> float:
    """One step in place, as torch.optim.AdamW does it.

    Args:
        master, exp_avg, exp_avg_sq: float32 [n], changed.
        grad: bfloat16 or float32 [n].
        weight: bfloat16 [n] that gets the new master, rounded; or None.

    Returns:
        The sum of the squares of the gradient as it came (not scaled): finite only if every element is.
    """
    squares = float(grad.double().square().sum())
    g = grad.float() * numbers.grad_scale
    beta1, beta2 = numbers.betas
    master.mul_(1 - numbers.lr * numbers.weight_decay)
    exp_avg.lerp_(g, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    denominator = (exp_avg_sq.sqrt() / (1 - beta2**numbers.step) ** 0.5).add_(numbers.eps)
    master.addcdiv_(exp_avg, denominator, value=-numbers.lr / (1 - beta1**numbers.step))
    if weight is not None:
        weight.copy_(master)
    return squares


def adamw_step_8bit(
    master: torch.Tensor,
    exp_avg: Dynamic8,
    exp_avg_sq: Dynamic8,
    grad: torch.Tensor,
    weight: torch.Tensor | None,
    numbers: AdamW,
) -> float:
    """The same with moments that rest in 8 bits: rounded after the step, which uses them unrounded.

    Args:
        exp_avg: signed, [n] as the others, changed.
        exp_avg_sq: unsigned, changed.
    """
    moments = dequantize_dynamic8(exp_avg), dequantize_dynamic8(exp_avg_sq)
    squares = adamw_step(master, *moments, grad, weight, numbers)
    for state, values in zip((exp_avg, exp_avg_sq), moments, strict=True):
        new = quantize_dynamic8(values, signed=state.signed)
        state.codes.copy_(new.codes)
        state.largest.copy_(new.largest)
    return squares
