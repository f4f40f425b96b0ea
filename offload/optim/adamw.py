"""AdamW (Loshchilov and Hutter, 2019) with float32 master weights and moments: 12 bytes a parameter.

one shard's state:  | master | first moment | second moment |
"""

from __future__ import annotations

import torch

from offload.kernels import reference
from offload.kernels.chosen import Kernels
from offload.optim.base import Numbers


class AdamW:
    """Args: kernels: what computes; betas, eps, weight_decay: as torch.optim.AdamW."""

    name = "adamw"
    state_bytes_per_param = 12.0

    def __init__(
        self,
        kernels: Kernels,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self._kernels, self.betas, self.eps, self.weight_decay = kernels, (betas[0], betas[1]), eps, weight_decay

    def state_nbytes(self, count: int) -> int:
        return 12 * count

    def start(self, state: torch.Tensor, weights: torch.Tensor) -> None:
        master, *moments = state.view(torch.float32).view(3, -1)
        master.copy_(weights)
        for moment in moments:
            moment.zero_()

    def step(self, state: torch.Tensor, cell: torch.Tensor, numbers: Numbers, *, decays: bool) -> None:
        master, mean, square = state.view(torch.float32).view(3, -1)
        given = reference.AdamW(
            lr=numbers.learning_rate,
            step=numbers.step,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay if decays else 0.0,
            grad_scale=numbers.grad_scale,
        )
        is_bf16 = cell.dtype == torch.bfloat16
        self._kernels.run("adamw_step", master, mean, square, cell, cell if is_bf16 else None, given)
        if not is_bf16:
            cell.copy_(master)

    def weights(self, state: torch.Tensor, cell: torch.Tensor) -> None:
        cell.copy_(state.view(torch.float32).view(3, -1)[0])
