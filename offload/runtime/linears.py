"""How nn.Linear computes on the CPU: by a kernel for few rows, and by torch without a copy of the weight for each row.

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

from offload.kernels import Choice

_HALF = (torch.bfloat16, torch.float16)


def install(root: nn.Module, choice: Choice) -> Callable[[], None]:
    """Gives every nn.Linear below `root` that forward; returns what takes it away again.

    Args:
        choice: the implementation of "linear" for few rows. With torch's own, results are what torch alone gives.
    """
    changed = [m for m in root.modules() if type(m) is nn.Linear and "forward" not in m.__dict__]
    if choice.implementation == "torch":
        changed = [m for m in changed if m.bias is None]
    for module in changed:
        module.forward = (  # type: ignore[method-assign]
            _by_torch(module) if choice.implementation == "torch" else _by_kernel(module, choice)
        )

    def remove() -> None:
        for module in changed:
            module.__dict__.pop("forward", None)

    return remove


def _by_torch(module: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        if is_unfoldable_row(x) and module.bias is None and module.weight.dtype in _HALF:
            return torch.stack([functional.linear(row.clone(), module.weight) for row in x])
        return functional.linear(x, module.weight, module.bias)

    return forward


def _by_kernel(module: nn.Linear, choice: Choice) -> Callable[[torch.Tensor], torch.Tensor]:
    linear, refuses, by_torch = choice.function(), choice.refuses(), _by_torch(module)

    def forward(x: torch.Tensor) -> torch.Tensor:
        weight, bias = module.weight, module.bias
        is_here = type(weight) is nn.Parameter  # and not what stands for a weight that was not brought
        if is_here and not (torch.is_grad_enabled() and x.requires_grad) and refuses(x, weight, bias) is None:
            return linear(x, weight, bias)  # type: ignore[no-any-return]
        return by_torch(x)

    return forward


def is_unfoldable_row(x: torch.Tensor) -> bool:
    """Whether `x` is [sequences, 1, width] on the CPU with gaps between its sequences."""
    return (
        x.dim() == 3 and x.shape[1] == 1 and x.device.type == "cpu" and x.stride(0) != x.shape[2] and x.stride(2) == 1
    )
