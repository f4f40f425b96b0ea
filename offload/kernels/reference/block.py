"""The small ops of a transformer's block between its products: norm, rotary embedding and gate."""

from __future__ import annotations

import torch
from torch.nn import functional


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., hidden] over its root mean square, times weight [hidden]; as transformers' LlamaRMSNorm rounds.

    Squares, mean and quotient are in float32; the quotient is rounded to x's dtype before it meets the weight.
    """
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def rotary(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys turned by their positions: number i of a head and number i + head_dim / 2 are a plane.

    Rounds as transformers' apply_rotary_pos_emb: each product, then their sum, to the dtype.

    Args:
        q, k: [batch, heads, tokens, head_dim]; k may have fewer heads.
        cos, sin: [batch or 1, tokens, head_dim] of the same dtype.
    """

    def turned(x: torch.Tensor) -> torch.Tensor:
        low, high = x.chunk(2, -1)
        return x * cos.unsqueeze(1) + torch.cat([-high, low], -1) * sin.unsqueeze(1)

    return turned(q), turned(k)


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, of one shape and dtype; silu is rounded to the dtype, then the product."""
    return functional.silu(gate) * up
