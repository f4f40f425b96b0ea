"""AdamW with float32 master weights and both moments in 8 bits: 6.03 bytes a parameter, half of what float32 takes.

    one shard's state:  | master | codes of the first moment | of the second | largest of each block of the first | ...

The moments are stored as 256 values, denser towards zero, times the largest magnitude of a block of 256 (Dettmers et
al., 2022); a step uses them unrounded and rounds what it stores. An approximation of `adamw`, and named so.
"""

from __future__ import annotations

from math import prod

import torch

from offload.kernels.formats.dynamic8 import BLOCK, Dynamic8, quantize_dynamic8
from offload.optim.adamw import AdamW
from offload.optim.base import Cost, Shape


class AdamW8bit(AdamW):
    """The same numbers and the same steps, on moments that rest in another form."""

    name = "adamw_8bit"
    cost = Cost(state_bytes=6.0 + 8 / BLOCK, touched_bytes=16.0, flops=64.0, op="adamw_step_8bit")

    def state_nbytes(self, shape: Shape) -> int:
        count = prod(shape)
        return 6 * count + 8 * count // BLOCK

    def _parts(self, state: torch.Tensor) -> tuple[torch.Tensor, Dynamic8, Dynamic8]:
        count = len(state) * BLOCK // (6 * BLOCK + 8)
        blocks = count // BLOCK
        master, codes, largest = state.split([4 * count, 2 * count, 8 * blocks])
        means, squares = codes.view(2, -1)
        of_means, of_squares = largest.view(torch.float32).view(2, -1)
        return master.view(torch.float32), Dynamic8(means, of_means, True), Dynamic8(squares, of_squares, False)

    def _clear(self, moment: Dynamic8) -> None:
        zero = quantize_dynamic8(torch.zeros(moment.codes.numel()), signed=moment.signed)
        moment.codes.copy_(zero.codes)
        moment.largest.copy_(zero.largest)
