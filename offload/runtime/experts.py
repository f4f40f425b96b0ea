"""A mixture's experts by a kernel that multiplies all their rows in one call, with no copy of a weight.

transformers looks the forward of a stack of experts up by a name in the model's configuration, as it does attention.
Where that is its own grouped product, a name of our own takes its place for the session. The steps are the same: rows
in the order of their experts, two products, the gate between them, the weighted sum of each token's experts.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from offload.kernels.chosen import Kernels
from offload.runtime.linears import needs_gradient
from offload.runtime.lookups import said, say

Product = Callable[[torch.Tensor, torch.Tensor, Sequence[int]], torch.Tensor]
"""x [rows of all experts], weight [experts, outputs, inputs], rows of each expert -> y."""

_GROUPED = "grouped_mm"
_numbers = itertools.count(1)


def install(root: nn.Module, kernels: Kernels) -> Callable[[], None]:
    """Gives the models below `root` those experts; returns what takes them away again.

    Raises:
        Vanished: this transformers would not look them up.
    """
    if "transformers" not in sys.modules or kernels.choice("linear_groups").implementation == "torch":
        return lambda: None
    if not any("down_proj" in module._parameters for module in root.modules()):
        return lambda: None  # no stacks of experts
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    every = {id(c): c for module in root.modules() if (c := getattr(module, "config", None)) is not None}
    mine = [config for config in every.values() if said(config, "experts") == _GROUPED]
    if not mine:
        return lambda: None
    name = f"offload-{next(_numbers)}"
    restore = say(mine, "experts", name)
    ALL_EXPERTS_FUNCTIONS.register(name, _forward(ALL_EXPERTS_FUNCTIONS[_GROUPED], kernels))

    def remove() -> None:
        restore()
        ALL_EXPERTS_FUNCTIONS._global_mapping.pop(name, None)

    return remove


def _forward(grouped: Callable[..., torch.Tensor], kernels: Kernels) -> Callable[..., torch.Tensor]:
    """A forward of experts in transformers' form."""

    def forward(
        module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        stacks = stacks_of(module)
        if stacks is None:
            kernels.decline("linear_groups", "experts of an unusual form")
        elif not needs_gradient(hidden_states, *stacks):
            whys = (kernels.refuses("linear_groups", hidden_states, stack, ()) for stack in stacks)
            if (why := next(filter(None, whys), None)) is None:
                return mix(module, stacks, hidden_states, top_k_index, top_k_weights, _by(kernels))
            kernels.decline("linear_groups", why)
        return grouped(module, hidden_states, top_k_index, top_k_weights)

    return forward


def _by(kernels: Kernels) -> Product:
    return lambda x, weight, rows: kernels.run("linear_groups", x, weight, rows)


def stacks_of(module: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The two stacks of a mixture's experts, [experts, outputs, inputs]; None where they are of another form."""
    flags = "has_bias", "is_transposed", "has_post_expert_norm", "_is_expert_parallel"
    if any(getattr(module, flag, False) for flag in flags):
        return None
    has_gate = getattr(module, "has_gate", True)
    first = module._parameters.get("gate_up_proj" if has_gate else "up_proj")
    last = module._parameters.get("down_proj")
    if type(first) is not nn.Parameter or type(last) is not nn.Parameter or (first.dim(), last.dim()) != (3, 3):
        return None
    return first, last


def mix(
    module: Any,
    stacks: tuple[torch.Tensor, torch.Tensor],
    hidden: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    product: Product,
) -> torch.Tensor:
    """The forward of a mixture's experts.

    Args:
        module: of transformers, which knows its gate and activation.
        stacks: see `stacks_of`.
        hidden: [tokens, width].
        chosen, weights: experts of each token, and what they count, [tokens, experts of a token].
        product: how to multiply by a stack.
    """
    tokens, each = chosen.shape
    experts, order = torch.sort(chosen.reshape(-1), stable=True)
    rows = torch.bincount(experts, minlength=stacks[0].shape[0]).tolist()
    y = product(hidden.index_select(0, order // each), stacks[0], rows)  # faster than hidden[...] by far
    y = module._apply_gate(y) if getattr(module, "has_gate", True) else module.act_fn(y)
    y = product(y, stacks[1], rows)
    shares = weights.reshape(-1)[order].unsqueeze(-1)
    y = y.mul_(shares) if shares.dtype == y.dtype and not needs_gradient(y, shares) else y * shares
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel())
    return y.index_select(0, back).view(tokens, each, -1).sum(1).to(hidden.dtype)
