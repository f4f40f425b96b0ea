"""APOLLO (Zhu et al., 2025): AdamW's learning rates, a row at a time, from gradients in few random dimensions.

    one shard's state:  | master | first moment [rows, rank] | second | norm of the last step |   vectors: as AdamW

A row of the gradient is projected to `rank` dimensions. AdamW's moments live there, and how much AdamW would stretch
the projected row is how much the row itself is stretched. The projection follows from a seed and is not stored: 4 bytes
a parameter and 8 x rank / columns. Where the authors project the shorter side of a matrix, this projects rows always,
so that a shard can be any of them; and it limits the growth of steps shard by shard.
"""

from __future__ import annotations

from math import prod, sqrt

import torch

from offload.kernels.chosen import Kernels
from offload.optim.adamw import AdamW
from offload.optim.base import Cost, Numbers, Shape

TINY = 1e-30  # beside the norm of a row that may be zero


class Apollo:
    """Args:
    kernels: of vectors, which AdamW updates; torch computes the rest.
    betas, eps, weight_decay: as torch.optim.AdamW.
    rank: dimensions of a projected row.
    update_proj_gap: steps between two projections.
    growth: of the norm of a step over that of the one before, at most.
    """

    name = "apollo"
    whole_rows = True

    def __init__(
        self,
        kernels: Kernels,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rank: int = 64,
        update_proj_gap: int = 200,
        growth: float = 1.01,
    ) -> None:
        if rank < 1 or update_proj_gap < 1:
            raise TypeError(f"rank={rank} and update_proj_gap={update_proj_gap} are at least 1")
        self._vectors = AdamW(kernels, betas=betas, eps=eps, weight_decay=weight_decay)
        self.betas, self.eps, self.weight_decay = (betas[0], betas[1]), eps, weight_decay
        self.rank, self.gap, self.growth = rank, update_proj_gap, growth
        self.cost = Cost(state_bytes=4.0, touched_bytes=40.0, flops=2.0 * rank + 6)
        self._projections: dict[int, tuple[int, torch.Tensor]] = {}  # columns -> which, and the matrix

    def state_nbytes(self, shape: Shape) -> int:
        if len(shape) < 2:
            return self._vectors.state_nbytes(shape)
        return 4 * (prod(shape) + 2 * shape[0] * self.rank + 1)

    def start(self, state: torch.Tensor, weights: torch.Tensor) -> None:
        if weights.dim() < 2:
            self._vectors.start(state, weights)
            return
        state.zero_()
        self._parts(state, weights.shape)[0].copy_(weights)

    def step(self, state: torch.Tensor, cell: torch.Tensor, numbers: Numbers, *, decays: bool) -> None:
        if cell.dim() < 2:
            self._vectors.step(state, cell, numbers, decays=decays)
            return
        master, mean, square, last = self._parts(state, cell.shape)
        gradient = cell.float().mul_(numbers.grad_scale)
        low = gradient @ self._projection(cell.shape[1], numbers.step)
        beta1, beta2 = self.betas
        mean.lerp_(low, 1 - beta1)
        square.mul_(beta2).addcmul_(low, low, value=1 - beta2)
        denominator = (square.sqrt() / (1 - beta2**numbers.step) ** 0.5).add_(self.eps)
        adapted = (mean / denominator).div_(1 - beta1**numbers.step)
        stretch = adapted.norm(dim=1) / low.norm(dim=1).add_(TINY)
        # Of n elements that are each about 1, as AdamW's are, `rank` have a norm that is smaller by this.
        update = gradient.mul_(stretch.mul_(sqrt(cell.shape[1] / self.rank)).unsqueeze(1))
        norm, before = float(update.norm()), float(last)
        if before > 0 and norm > self.growth * before:
            update.mul_(self.growth * before / norm)
            norm = self.growth * before
        last.fill_(norm)
        if decays and self.weight_decay:
            master.mul_(1 - numbers.learning_rate * self.weight_decay)
        master.add_(update, alpha=-numbers.learning_rate)
        cell.copy_(master)

    def weights(self, state: torch.Tensor, cell: torch.Tensor) -> None:
        if cell.dim() < 2:
            self._vectors.weights(state, cell)
        else:
            cell.copy_(self._parts(state, cell.shape)[0])

    def _parts(self, state: torch.Tensor, shape: Shape) -> tuple[torch.Tensor, ...]:
        """Master weights, both moments of projected rows, and the norm of the last step."""
        low = shape[0] * self.rank
        master, mean, square, last = state.view(torch.float32).split([prod(shape), low, low, 1])
        return master.view(shape), mean.view(-1, self.rank), square.view(-1, self.rank), last

    def _projection(self, columns: int, step: int) -> torch.Tensor:
        """The random matrix [columns, rank] of these steps, which keeps norms in the mean."""
        which = (step - 1) // self.gap
        found = self._projections.get(columns)
        if found is None or found[0] != which:
            generator = torch.Generator().manual_seed(which * 1_000_003 + columns)
            made = torch.randn(columns, self.rank, generator=generator).div_(sqrt(self.rank))
            found = self._projections[columns] = (which, made)
        return found[1]
