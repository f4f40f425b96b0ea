"""How transformers' Conv1D, a linear layer whose weight is [inputs, outputs], computes: by a kernel for few rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from offload.kernels.chosen import Kernels
from offload.runtime.discovery import is_conv1d
from offload.runtime.linears import needs_gradient


def install(root: nn.Module, kernels: Kernels) -> Callable[[], None]:
    """Gives every Conv1D below `root` the kernel; returns what takes it away again."""
    changed = [m for m in root.modules() if is_conv1d(m) and "forward" not in m.__dict__]
    if kernels.choice("linear_transposed").implementation == "torch":
        changed = []
    for module in changed:
        module.forward = forward_of(module, kernels)  # type: ignore[method-assign]

    def remove() -> None:
        for module in changed:
            module.__dict__.pop("forward", None)

    return remove


def forward_of(module: nn.Module, kernels: Kernels) -> Callable[[torch.Tensor], torch.Tensor]:
    """The forward of one of them, with that kernel."""
    own = type(module).forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        weight, bias = module._parameters["weight"], module._parameters["bias"]
        if type(weight) is nn.Parameter and not needs_gradient(x, weight):
            y = kernels.attempt("linear_transposed", x.contiguous(), weight, bias)
            if y is not None:
                return y  # type: ignore[no-any-return]
        return own(module, x)  # type: ignore[no-any-return]

    return forward
