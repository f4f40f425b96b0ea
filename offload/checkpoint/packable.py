"""Which matrices of a model may be kept in fewer bits: those that only products use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from offload.checkpoint.describe import EXPERTS
from offload.kernels.formats.weights import WeightFormat
from offload.runtime.discovery import Anatomy
from offload.tiers.layout import Source


def packable(
    anatomy: Anatomy, sources: Mapping[str, Source], config: Any, format: WeightFormat, *, blocks_only: bool
) -> Iterator[str]:
    """Names of parameters that `format` may take.

    A lossless format takes every weight of an nn.Linear, also one that an embedding shares. An approximate one leaves
    embeddings, heads and routers as they are.

    Args:
        config: the model's; a matrix with as many outputs as it has experts is a router.
        blocks_only: linears inside a unit only, and not those that are one, such as a head.
    """
    unit_of = {name: unit for unit in anatomy.units for name in unit.tensors}
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    experts = {getattr(text, name, None) for name in EXPERTS} - {None}
    for name, source in sources.items():
        modules = [o.module for o in anatomy.owners[name]]
        if name not in unit_of or not format.takes(source.dtype, source.shape):
            continue
        linears = [m for m in modules if type(m) is nn.Linear]
        tables = [m for m in modules if type(m) is nn.Embedding and m.max_norm is None]
        if not linears or len(linears) + len(tables) < len(modules):
            continue
        is_block = not tables and unit_of[name].module not in modules
        if (is_block or not (blocks_only or format.is_approximate)) and not (
            format.is_approximate and source.shape[0] in experts
        ):
            yield name
