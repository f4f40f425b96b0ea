"""A model as the planner sees it: numbers from its tensors and, where there is one, its configuration. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any

from offload.specs import ModelSpec, TensorSpec, UnitSpec

if TYPE_CHECKING:
    from offload.checkpoint.plain import Layers, Plain
    from offload.runtime.discovery import Anatomy
    from offload.tiers.layout import Source

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk")


def describe(anatomy: Anatomy | Layers, sources: Mapping[str, Source | Plain], config: Any = None) -> ModelSpec:
    """The numbers of a model.

    Args:
        anatomy, sources: of a module tree, or as `recognition` makes them of names and shapes.
        config: transformers' configuration; without one, what it would tell is unknown (0).
    """
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    itemsize = min(4, max((s.dtype.itemsize for s in sources.values()), default=2))  # of what the model computes in
    hidden = getattr(text, "hidden_size", 0) or 0
    heads = getattr(text, "num_attention_heads", None) or 1
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or hidden // heads
    layers = getattr(text, "num_hidden_layers", 0) or 0
    vocabulary = getattr(text, "vocab_size", None) or 0
    experts = next((n for name in EXPERTS if (n := getattr(text, name, None))), 0)
    chosen = next((n for name in _CHOSEN if (n := getattr(text, name, None))), experts)
    blocks = {u.name for u in anatomy.units if u.name.rpartition(".")[2].isdigit()}  # items of a list
    matrices = [s.shape for u in anatomy.units for n in u.tensors if len((s := sources[n]).shape) >= 2]
    dtypes = Counter(source.dtype for source in sources.values()).most_common(1)
    mean = sum(s.nbytes for s in sources.values()) / max(1, len(anatomy.units))

    def tensor(name: str) -> TensorSpec:
        source = sources[name]
        outputs, inputs = source.shape if name in anatomy.linears else (0, 0)
        is_transposed = name in anatomy.transposed
        is_stack = len(source.shape) == 3 and experts > 0 and source.shape[0] == experts
        return TensorSpec(
            name=name,
            nbytes=source.nbytes,
            read_nbytes=source.read_nbytes,
            slot_nbytes=source.unpacked.slot_nbytes,
            staged_nbytes=source.unpacked.staged_nbytes,
            is_table=name in anatomy.tables and source.nbytes * 64 > mean and len(source.pieces) == 1,
            outputs=outputs,
            inputs=inputs,
            is_packed=source.is_stored_packed,
            format=_format(source),
            stored_format=_format(source.unpacked),
            elements=prod(source.shape),
            width=source.shape[0 if is_transposed else -1] if len(source.shape) >= 2 else 0,
            is_transposed=is_transposed,
            experts=experts if is_stack else 0,
            chosen=chosen if is_stack else 0,
        )

    units = tuple(
        UnitSpec(
            name=u.name,
            tensors=tuple(map(tensor, u.tensors)),
            layers=-(-layers // len(blocks)) if u.name in blocks else 0,
            is_head=any(_is_head(sources[n], vocabulary) and n not in anatomy.tables for n in u.tensors),
        )
        for u in anatomy.units
    )
    return ModelSpec(
        units=units,
        loose=tuple(map(tensor, anatomy.loose)),
        params=sum(prod(s.shape) for s in sources.values()),
        kv_bytes_per_token=2 * layers * kv_heads * head_dim * itemsize,
        kv_layers=layers,
        hidden_nbytes=hidden * itemsize,
        widest_nbytes=max((max(shape[-2:]) for shape in matrices if shape[0] != vocabulary), default=hidden) * itemsize,
        logits_nbytes=vocabulary * (itemsize + 8),
        max_tokens=getattr(text, "max_position_embeddings", None),
        dtype=_word(dtypes[0][0]) if dtypes else "",
        heads=heads if hidden else 0,
        kv_heads=kv_heads if hidden else 0,
        head_dim=head_dim,
    )


def _is_head(source: Source | Plain, vocabulary: int) -> bool:
    return len(source.shape) == 2 and source.shape[0] == vocabulary


def _format(source: Source | Plain) -> str:
    """What a tensor's elements are, in a word: the dtype, or the packed format with its group."""
    if source.form is None:
        return _word(source.dtype)
    return f"{source.form.kind}-{source.form.group}" if source.form.group else source.form.kind


def _word(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
