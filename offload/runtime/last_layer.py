"""A model's last decoder layer, run for those rows alone that something is made of: each sequence's last token.

Of a prompt, the layers before need every token; the last one needs their keys and values, but queries, attention,
feed-forward and what follows for its last token only. So that layer's forward is called twice: with all rows until its
attention has keys and values, which ends the call, and then with the rows that count.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map


class Enough(Exception):
    """Raised in a layer by its attention, once it has what the call was for."""


def last_layer(model: nn.Module, layers: int) -> nn.Module | None:
    """The last of so many decoder layers, each of which has one number, its place; None where there is no such list."""
    for module in model.modules():
        if not isinstance(module, nn.ModuleList) or len(module) != layers:
            continue
        if all(_numbers(layer) == {place} for place, layer in enumerate(module)):
            return module[-1]
    return None


def _numbers(layer: nn.Module) -> set[int]:
    numbers = (getattr(m, "layer_idx", None) for m in layer.modules())
    return {number for number in numbers if number is not None}


def of_rows(rows: torch.Tensor, whole: int, arguments: Any) -> Any:
    """What a layer is given, nested, for these of `whole` rows: whatever has a place for each row is cut.

    Args:
        rows: int64, their places.
    """

    def cut(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if leaf.dim() >= 2 and leaf.shape[:2] == (1, whole):
            return leaf.index_select(1, rows)
        if leaf.shape == (whole,) and not leaf.is_floating_point():
            return leaf.index_select(0, rows)
        return leaf

    return tree_map(cut, arguments)


def among_rows(rows: torch.Tensor, whole: int, results: Any) -> Any:
    """What a layer gave for some rows, nested, among `whole` rows: the others are zeros.

    Args:
        rows: int64, the places of the first ones given; what is given beyond them is left out.
    """
    return tree_map(partial(_spread, rows, whole), results)


def _spread(rows: torch.Tensor, whole: int, leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    found = leaf.new_zeros(1, whole, *leaf.shape[2:])
    found[:, rows] = leaf[:, : len(rows)]
    return found


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Gives a module another forward, which its hooks stay around; returns what undoes that."""
    before = module.__dict__.get("forward")
    module.forward = forward  # type: ignore[method-assign]

    def undo() -> None:
        if before is None:
            module.__dict__.pop("forward", None)
        else:
            module.forward = before  # type: ignore[method-assign]

    return undo
