"""A well-known decoder in numbers, from config.json and headers alone: no module is built, no torch is loaded.

Building a 70 B model on meta takes seconds, most of them imports. What a plan needs of it follows from names and shapes
where the architecture is one of `decoders`. Every stored name and shape must be as expected; with the first that is
not, there is no answer, and the caller takes the model's own modules (`outline`), which this must always agree with.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod
from types import SimpleNamespace
from typing import Any

from offload.checkpoint.decoders import DECODERS, Decoder, Param, Sizes
from offload.checkpoint.describe import EXPERTS, describe
from offload.checkpoint.plain import Dtype, Group, Layers, Plain
from offload.io.safetensors import Entry
from offload.specs import ModelSpec
from offload.tiers.slots import Run, Way, slot_nbytes, way_of

_TABLE, _NORM, _HEAD = "model.embed_tokens", "model.norm", "lm_head"
_REFUSED = ("quantization_config", "auto_map", "is_encoder_decoder")

_BF16, _F16, _F32 = Dtype("bfloat16", 2), Dtype("float16", 2), Dtype("float32", 4)
_STORED = {"BF16": _BF16, "F16": _F16, "F32": _F32}
_NAMED = {dtype.name: dtype for dtype in _STORED.values()}


def recognise(config: Mapping[str, Any], entries: Mapping[str, Entry] | None, dtype: str) -> ModelSpec | None:
    """The numbers of a decoder that is known; None for any other, and wherever something is unusual.

    Args:
        config: what config.json holds.
        entries: the checkpoint's tensors; None: every parameter is as the configuration makes it.
        dtype: as for `open_checkpoint`.
    """
    decoder = DECODERS.get(str(config.get("model_type")))
    sizes = _sizes(config, decoder) if decoder is not None else None
    wanted = _dtype(config, entries, dtype)
    if decoder is None or sizes is None or wanted is None:
        return None
    is_tied = config.get("tie_word_embeddings", decoder.is_tied)
    if not isinstance(is_tied, bool):
        return None
    layer = decoder.layer(sizes)
    table = Param(f"{_TABLE}.weight", (sizes.vocabulary, sizes.hidden))
    norm = [Param(f"{_NORM}.weight", (sizes.hidden,))]
    if decoder.norm_bias:
        norm.append(Param(f"{_NORM}.bias", (sizes.hidden,)))
    head = Param(f"{_HEAD}.weight", table.shape, is_linear=True)
    blocks = sizes.layers * sum(prod(p.shape) for p in layer)
    if blocks <= prod(table.shape) + sum(prod(p.shape) for p in norm):
        return None  # the embedding outweighs the layers: `discovery` divides such a model in another way
    places: list[tuple[str, list[Param]]] = [] if is_tied else [(_TABLE, [table])]
    for k in range(sizes.layers):
        at = f"model.layers.{k}"
        places.append((at, [_below(at, param) for param in layer]))
    places += [(_NORM, norm), (_HEAD, [table if is_tied else head])]
    params = [param for _, unit in places for param in unit]
    sources = _nominal(params, wanted) if entries is None else _stored(params, entries, wanted)
    if sources is None:
        return None
    if entries is not None and set(entries) - {s for p in params for s in p.stored or (p.name,)}:
        extra = set(entries) - {s for p in params for s in p.stored or (p.name,)}
        if not is_tied or extra != {head.name} or entries[head.name].shape != head.shape:
            return None
    layers = Layers(
        units=tuple(Group(name, tuple(p.name for p in unit)) for name, unit in places),
        loose=(),
        tables=frozenset() if is_tied else frozenset({table.name}),
        linears=frozenset(p.name for p in params if p.is_linear),
    )
    return describe(layers, sources, SimpleNamespace(**config))


def _sizes(config: Mapping[str, Any], decoder: Decoder) -> Sizes | None:
    """What the configuration says, where it says all that is needed and nothing unusual."""
    if any(config.get(name) for name in _REFUSED):
        return None
    if any(name in config and config[name] != value for name, value in decoder.only.items()):
        return None
    mixture = next((name for name in EXPERTS if name in config), None)
    inner = "moe_intermediate_size" if "moe_intermediate_size" in config else "intermediate_size"
    names = ("hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", inner)
    names = (*names, "max_position_embeddings", *((mixture, "num_experts_per_tok") if mixture else ()))
    names = (*names, *(("head_dim",) if decoder.has_head_dim or config.get("head_dim") is not None else ()))
    if any(type(config.get(name)) is not int or not 0 < config[name] < 2**31 for name in names):
        return None
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    dim = config.get("head_dim") or hidden // heads
    if config["num_hidden_layers"] < 2 or (dim * heads != hidden and not config.get("head_dim")):
        return None
    return Sizes(
        hidden=hidden,
        vocabulary=config["vocab_size"],
        layers=config["num_hidden_layers"],
        inner=config[inner],
        queries=heads * dim,
        keys=config["num_key_value_heads"] * dim,
        head_dim=dim,
        experts=config[mixture] if mixture else 0,
    )


def _dtype(config: Mapping[str, Any], entries: Mapping[str, Entry] | None, asked: str) -> Dtype | None:
    """What parameters are loaded as, for the few types that decoders have."""
    if asked != "auto":
        return _NAMED.get(asked)
    named = config.get("dtype", config.get("torch_dtype"))
    if named is None and entries:
        return _STORED.get(Counter(e.dtype for e in entries.values()).most_common(1)[0][0])
    return _NAMED.get(str(named)) if named is not None else _F32


def _below(at: str, param: Param) -> Param:
    return param._replace(name=f"{at}.{param.name}", stored=tuple(f"{at}.{name}" for name in param.stored))


def _nominal(params: list[Param], dtype: Dtype) -> dict[str, Plain]:
    """Every parameter as one piece that is stored as it is used."""
    found = {}
    for param in params:
        nbytes = prod(param.shape) * dtype.itemsize
        found[param.name] = Plain(dtype, param.shape, (nbytes,), slot_nbytes(nbytes, None))
    return found


def _stored(params: list[Param], entries: Mapping[str, Entry], dtype: Dtype) -> dict[str, Plain] | None:
    """Every parameter as it is stored; None where one is not, or not as expected."""
    found = {}
    for param in params:
        names = param.stored or (param.name,)
        stored = [entries[name] for name in names if name in entries]
        part = param.shape
        if len(param.shape) == 3:  # a stack: each expert's matrix, or an equal part of its rows
            part = (param.shape[0] * param.shape[1] // len(names), param.shape[2])
        if len(stored) < len(names) or any(e.shape != part or e.dtype not in _STORED for e in stored):
            return None
        nbytes = prod(param.shape) * dtype.itemsize
        first = stored[0]
        is_plain = len(stored) == 1 and _STORED[first.dtype] == dtype and first.offset % dtype.itemsize == 0
        way = None if is_plain else _way(stored, dtype)
        staged = way.staged_nbytes if way else 0
        pieces = tuple(e.nbytes for e in stored)
        found[param.name] = Plain(dtype, param.shape, pieces, slot_nbytes(nbytes, way), staged)
    return found


def _way(stored: Sequence[Entry], dtype: Dtype) -> Way:
    """How a tensor comes to a slot that is stored as these, in its order."""
    runs, at = [], 0
    for entry in stored:
        runs.append(Run(entry.extent, at))
        at += entry.nbytes // _STORED[entry.dtype].itemsize * dtype.itemsize
    return way_of(runs, dtype.itemsize, as_stored=all(_STORED[e.dtype] == dtype for e in stored))
