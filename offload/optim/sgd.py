"""SGD with momentum and float32 master weights, as torch.optim.SGD computes it: 8 bytes a parameter.

one shard's state:  | master | momentum |
"""

from __future__ import annotations

from math import prod

import torch

from offload.kernels.chosen import Kernels
from offload.optim.base import Cost, Numbers, Shape


class SGD:
    """Args: kernels: unused, torch computes; momentum, weight_decay: as torch.optim.SGD, dampening 0."""

    name = "sgd"
    cost = Cost(state_bytes=8.0, touched_bytes=48.0, flops=4.0)  # each of torch's ops passes through memory
    whole_rows = False

    def __init__(self, kernels: Kernels, *, momentum: float = 0.9, weight_decay: float = 0.0) -> None:
        self.momentum, self.weight_decay = momentum, weight_decay

    def state_nbytes(self, shape: Shape) -> int:
        return 8 * prod(shape)

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
