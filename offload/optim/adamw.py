"""AdamW (Loshchilov and Hutter, 2019) with float32 master weights and moments: 12 bytes a parameter.

one shard's state:  | master | first moment | second moment |
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from offload.kernels import reference
from offload.kernels.chosen import Kernels
from offload.optim.base import Cost, Numbers, Shape


class AdamW:
    """Args: kernels: what computes; betas, eps, weight_decay: as torch.optim.AdamW."""

    name = "adamw"
    cost = Cost(state_bytes=12.0, touched_bytes=28.0, flops=16.0, op="adamw_step")
    whole_rows = False

    def __init__(
        self,
        kernels: Kernels,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self._kernels, self.betas, self.eps, self.weight_decay = kernels, (betas[0], betas[1]), eps, weight_decay

    def state_nbytes(self, shape: Shape) -> int:
        return 12 * prod(shape)

    def start(self, state: torch.Tensor, weights: torch.Tensor) -> None:
        master, *moments = self._parts(state)
        master.copy_(weights)
        for moment in moments:
            self._clear(moment)

    def step(self, state: torch.Tensor, cell: torch.Tensor, numbers: Numbers, *, decays: bool) -> None:
        master, mean, square = self._parts(state)
        given = reference.AdamW(
            lr=numbers.learning_rate,
            step=numbers.step,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay if decays else 0.0,
            grad_scale=numbers.grad_scale,
        )
        is_bf16 = cell.dtype == torch.bfloat16
        assert self.cost.op is not None
        self._kernels.run(self.cost.op, master, mean, square, cell, cell if is_bf16 else None, given)
        if not is_bf16:
            cell.copy_(master)

    def weights(self, state: torch.Tensor, cell: torch.Tensor) -> None:
        cell.copy_(self._parts(state)[0])

    def _parts(self, state: torch.Tensor) -> tuple[torch.Tensor, Any, Any]:
        """Master weights and both moments, as views of the state."""
        master, mean, square = state.view(torch.float32).view(3, -1)
        return master, mean, square

    def _clear(self, moment: Any) -> None:
        moment.zero_()
