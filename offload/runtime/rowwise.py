"""One matrix product that torch does with a copy of the weight for each sequence, done without.

Generation asks the head for the last token only, `head(hidden[:, -1:, :])`. That slice cannot be folded into a matrix,
so torch's CPU path runs a batched product and first copies a 16-bit weight once for every sequence: 6 GiB for a head of
200 MB and 32 sequences, and 20 seconds. Row by row gives the same bits (a batch of products with one row each) at the
speed of the weight's size. It was compared for 16-bit weights without a bias, and is used for those only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

_HALF = (torch.bfloat16, torch.float16)


def install(root: nn.Module) -> Callable[[], None]:
    """Gives every nn.Linear without a bias below `root` that forward; returns what takes it away again."""
    changed = [m for m in root.modules() if type(m) is nn.Linear and m.bias is None and "forward" not in m.__dict__]
    for module in changed:
        module.forward = _forward_of(module)  # type: ignore[method-assign]

    def remove() -> None:
        for module in changed:
            module.__dict__.pop("forward", None)

    return remove


def _forward_of(module: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        if is_unfoldable_row(x) and module.weight.dtype in _HALF:
            return torch.stack([functional.linear(row.clone(), module.weight) for row in x])
        return functional.linear(x, module.weight)

    return forward


def is_unfoldable_row(x: torch.Tensor) -> bool:
    """Whether `x` is [sequences, 1, width] on the CPU with gaps between its sequences."""
    return (
        x.dim() == 3 and x.shape[1] == 1 and x.device.type == "cpu" and x.stride(0) != x.shape[2] and x.stride(2) == 1
    )
