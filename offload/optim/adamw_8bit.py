"""AdamW with float32 master weights and both moments in 8 bits: 6.03 bytes a parameter, half of what float32 takes.

    one shard's state:  | master | codes of the first moment | of the second | largest of each block of the first | ...

The moments are stored as 256 values, denser towards zero, times the largest magnitude of a block of 256 (Dettmers et
al., 2022); a step uses them unrounded and rounds what it stores. An approximation of `adamw`, and named so.
"""

from __future__ import annotations

import torch

from offload.kernels import reference
from offload.kernels.chosen import Kernels
from offload.kernels.formats.dynamic8 import BLOCK, Dynamic8, quantize_dynamic8
from offload.optim.base import Numbers


class AdamW8bit:
    """Args: kernels: what computes; betas, eps, weight_decay: as torch.optim.AdamW."""

    name = "adamw_8bit"
    state_bytes_per_param = 6.0 + 8 / BLOCK

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
        return 6 * count + 8 * count // BLOCK

    def start(self, state: torch.Tensor, weights: torch.Tensor) -> None:
        master, *moments = self._parts(state)
        master.copy_(weights)
        for moment in moments:
            zero = quantize_dynamic8(torch.zeros(len(master)), signed=moment.signed)
            moment.codes.copy_(zero.codes)
            moment.largest.copy_(zero.largest)

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
        self._kernels.run("adamw_step_8bit", master, mean, square, cell, cell if is_bf16 else None, given)
        if not is_bf16:
            cell.copy_(master)

    def weights(self, state: torch.Tensor, cell: torch.Tensor) -> None:
        cell.copy_(self._parts(state)[0])

    def _parts(self, state: torch.Tensor) -> tuple[torch.Tensor, Dynamic8, Dynamic8]:
        count = len(state) * BLOCK // (6 * BLOCK + 8)
        blocks = count // BLOCK
        master, codes, largest = state.split([4 * count, 2 * count, 8 * blocks])
        means, squares = codes.view(2, -1)
        of_means, of_squares = largest.view(torch.float32).view(2, -1)
        return master.view(torch.float32), Dynamic8(means, of_means, True), Dynamic8(squares, of_squares, False)
