"""Attention of one new token by a kernel that reads keys and values where they lie; everything else by torch's sdpa.

transformers' models look their attention up by a name in their configuration. A name of our own is registered for each
session and written into the configurations that say "sdpa"; masks are made as for sdpa.
"""

from __future__ import annotations

import inspect
import itertools
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from offload.kernels.chosen import Kernels
from offload.runtime.linears import needs_gradient
from offload.runtime.lookups import said, say

_SDPA = "sdpa"
_numbers = itertools.count(1)
_ASKS_FOR_SDPA = re.compile(r"_attn_implementation\b.*\bsdpa\b")


def install(root: nn.Module, kernels: Kernels) -> Callable[[], None]:
    """Gives the models below `root` that attention; returns what takes it away again.

    Raises:
        Vanished: this transformers would not look it up.
    """
    if "transformers" not in sys.modules or kernels.choice("decode_attention").implementation != "cpu":
        return lambda: None
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    every = {id(c): c for module in root.modules() if (c := getattr(module, "config", None)) is not None}
    configs = [config for config in every.values() if said(config, "attn") == _SDPA]
    if not configs or has_its_own_attention(root):
        return lambda: None
    name = f"offload-{next(_numbers)}"
    restore = say(configs, "attn", name)
    AttentionInterface.register(name, _attention(ALL_ATTENTION_FUNCTIONS[_SDPA], kernels))
    AttentionMaskInterface.register(name, sdpa_mask)

    def remove() -> None:
        restore()
        for interface in (AttentionInterface, AttentionMaskInterface):
            interface._global_mapping.pop(name, None)

    return remove


def has_its_own_attention(root: nn.Module) -> bool:
    """Whether any model below `root` does not look its attention up in transformers' table."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    files = {type(module).__module__ for module in root.modules()}
    return any(_has_its_own(sys.modules[file], ALL_ATTENTION_FUNCTIONS) for file in files)


def _has_its_own(file: Any, everybodys: Any) -> bool:
    """Whether a modelling file has an attention of its own for sdpa, or asks for it by name."""
    if getattr(file, "ALL_ATTENTION_FUNCTIONS", everybodys) is not everybodys:
        return True
    if not file.__name__.startswith("transformers.models."):
        return False
    return _ASKS_FOR_SDPA.search(inspect.getsource(file)) is not None


def _attention(sdpa: Callable[..., Any], kernels: Kernels) -> Callable[..., Any]:
    """An attention function in transformers' form: heads [batch, heads, tokens, head_dim] in, tokens first out."""

    def attend(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        if query.shape[2] == 1 and not needs_gradient(query, key, value):
            why = _refuses(key, attention_mask, dropout, kwargs)
            if why is None:
                first = None if attention_mask is None else _first(attention_mask)
                scale = scaling if scaling is not None else query.shape[-1] ** -0.5
                found = kernels.attempt("decode_attention", query, key, value, scale=scale, first=first)
                if found is not None:
                    return found[0].transpose(1, 2), None
            else:
                kernels.decline("decode_attention", why)
        return sdpa(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )

    return attend


def _refuses(key: torch.Tensor, mask: torch.Tensor | None, dropout: float, kwargs: dict[str, Any]) -> str | None:
    """Why a token's attention is not a softmax over one run of tokens up to the last."""
    if dropout:
        return "dropout"
    for name in ("position_bias", "cache", "softcap", "s_aux"):
        if kwargs.get(name) is not None:
            return name
    if mask is None:
        return None
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape != (key.shape[0], 1, 1, key.shape[2]):
        return f"a mask of {mask.dtype} and shape {tuple(mask.shape)}"
    return None if _first(mask) is not None else "a mask with holes"


def _first(mask: torch.Tensor) -> torch.Tensor | None:
    """The first token that each sequence sees; None where it does not see all from there on.

    All layers get the same mask, so what was found is kept with it.
    """
    found: list[torch.Tensor | None] | None = getattr(mask, "_offload_first", None)
    if found is None:
        seen = mask[:, 0, 0]
        is_run = not bool((seen[:, :-1] & ~seen[:, 1:]).any()) and bool(seen[:, -1].all())
        found = [seen.shape[1] - seen.sum(1) if is_run else None]
        mask._offload_first = found  # type: ignore[attr-defined]
    return found[0]
