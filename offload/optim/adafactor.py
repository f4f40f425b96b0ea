"""Adafactor (Shazeer and Stern, 2018): second moments of rows and of columns, not of elements: 4 bytes a parameter.

    one shard's state:  | master | mean square of each row | of each column |      vectors: | master | mean squares |

A shard is rows of one matrix, so a matrix of more than 2 Mi parameters has a column's mean squares once for each of its
shards, and steps are limited shard by shard. With smaller ones this is torch.optim.Adafactor.
"""

from __future__ import annotations

from math import prod

import torch

from offload.kernels.chosen import Kernels
from offload.optim.base import Cost, Numbers, Shape


class Adafactor:
    """As `optim="adafactor"` of transformers has it: no momentum, and steps of the learning rate.

    Args:
        kernels: unused, torch computes.
        weight_decay: shrinks weights by learning rate times this.
        decay_rate: the second moments' decay in step t is 1 - t ** decay_rate.
        clip_threshold: root mean square of a step before the learning rate, at most.
        eps: smallest mean square, and smallest root mean square of weights that a step is measured by.
        scale_parameter: steps in proportion to the weights' root mean square, as torch.optim.Adafactor takes them.
    """

    name = "adafactor"
    cost = Cost(state_bytes=4.0, touched_bytes=40.0, flops=10.0)
    whole_rows = True

    def __init__(
        self,
        kernels: Kernels,
        *,
        weight_decay: float = 0.0,
        decay_rate: float = -0.8,
        clip_threshold: float = 1.0,
        eps: tuple[float, float] = (1e-30, 1e-3),
        scale_parameter: bool = False,
    ) -> None:
        self.weight_decay, self.decay_rate, self.clip_threshold = weight_decay, decay_rate, clip_threshold
        self.eps, self.scale_parameter = (eps[0], eps[1]), scale_parameter

    def state_nbytes(self, shape: Shape) -> int:
        return 4 * (prod(shape) + (sum(shape) if len(shape) == 2 else shape[0]))

    def start(self, state: torch.Tensor, weights: torch.Tensor) -> None:
        master, *squares = self._parts(state, weights.shape)
        master.copy_(weights)
        for square in squares:
            square.zero_()

    def step(self, state: torch.Tensor, cell: torch.Tensor, numbers: Numbers, *, decays: bool) -> None:
        master, *squares = self._parts(state, cell.shape)
        gradient = cell.float().mul_(numbers.grad_scale)
        new = numbers.step**self.decay_rate
        if cell.dim() == 2:
            rows, columns = squares
            rows.lerp_(gradient.norm(dim=1).square_().div_(cell.shape[1]), new)
            columns.lerp_(gradient.norm(dim=0).square_().div_(cell.shape[0]), new)
            expected = torch.outer(rows / rows.mean().clamp_(min=self.eps[0]), columns)
        else:
            (square,) = squares
            square.lerp_(gradient.square(), new)
            expected = square.clone()
        update = expected.clamp_(min=self.eps[0]).rsqrt_().mul_(gradient)
        size = cell.numel() ** 0.5
        rate = numbers.learning_rate / max(1.0, float(update.norm()) / (size * self.clip_threshold))
        if self.scale_parameter:
            rate *= max(self.eps[1], float(master.norm()) / size)
        if decays and self.weight_decay:
            master.mul_(1 - numbers.learning_rate * self.weight_decay)
        master.add_(update, alpha=-rate)
        cell.copy_(master)

    def weights(self, state: torch.Tensor, cell: torch.Tensor) -> None:
        cell.copy_(self._parts(state, cell.shape)[0])

    def _parts(self, state: torch.Tensor, shape: Shape) -> list[torch.Tensor]:
        """Master weights in their shape, and the mean squares."""
        master, *squares = state.view(torch.float32).split([prod(shape), *shape])
        return [master.view(shape), *squares]
