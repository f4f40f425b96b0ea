"""SGD with momentum and float32 master weights, as torch.optim.SGD computes it: 8 bytes a parameter.

one shard's state:  | master | momentum |
"""

from __future__ import annotations

import torch

from offload.kernels.chosen import Kernels
from offload.optim.base import Numbers


class SGD:
    """Args: kernels: unused, torch computes; momentum, weight_decay: as torch.optim.SGD, dampening 0."""

    name = "sgd"
    state_bytes_per_param = 8.0

    def __init__(self, kernels: Kernels, *, momentum: float = 0.9, weight_decay: float = 0.0) -> None:
        self.momentum, self.weight_decay = momentum, weight_decay

    def state_nbytes(self, count: int) -> int:
        return 8 * count

    def start(self, state: torch.Tensor, weights: torch.Tensor) -> None:
        master, momentum = state.view(torch.float32).view(2, -1)
        master.copy_(weights)
        momentum.zero_()

    def step(self, state: torch.Tensor, cell: torch.Tensor, numbers: Numbers, *, decays: bool) -> None:
        master, momentum = state.view(torch.float32).view(2, -1)
        gradient = cell.float() * numbers.grad_scale
        if decays and self.weight_decay:
            gradient.add_(master, alpha=self.weight_decay)
        momentum.mul_(self.momentum).add_(gradient)
        master.add_(momentum, alpha=-numbers.learning_rate)
        cell.copy_(master)

    def weights(self, state: torch.Tensor, cell: torch.Tensor) -> None:
        cell.copy_(state.view(torch.float32).view(2, -1)[0])
