"""What one layer of well-known decoders holds, by model_type: parameters in the order of transformers' modules.

This is knowledge that a plan may use before it loads transformers; nothing that runs a model looks at it. Whoever reads
it compares every name and shape with the checkpoint's headers, and takes the model's own modules where they differ
(`recognition`). tests/test_recognition.py holds each line to transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """A decoder's sizes, from its configuration.

    Attributes:
        hidden, vocabulary, layers: as everybody calls them.
        inner: outputs of a gated MLP's first matrices, or of one expert's.
        queries, keys: rows of the matrices that make queries, and keys or values.
        head_dim: of one head.
        experts: of a mixture; else 0.
    """

    hidden: int
    vocabulary: int
    layers: int
    inner: int
    queries: int
    keys: int
    head_dim: int
    experts: int = 0


class Param(NamedTuple):
    """A parameter of a layer.

    Attributes:
        name: below its layer.
        shape: as the model has it.
        is_linear: the weight of an nn.Linear.
        stored: the tensors that a checkpoint stores it as, each an equal part along its rows; empty: one of its name.
    """

    name: str
    shape: Shape
    is_linear: bool = False
    stored: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """An architecture.

    Attributes:
        layer: the parameters of a layer.
        is_tied: whether head and embedding are one where the configuration says nothing.
        has_head_dim: head_dim is a number of its own, which the configuration must name.
        norm_bias: whether the last norm has a bias.
        only: what the configuration must say, or nothing, for this to hold.
    """

    layer: Callable[[Sizes], list[Param]]
    is_tied: bool = False
    has_head_dim: bool = False
    norm_bias: bool = False
    only: Mapping[str, object] = field(default_factory=dict)


def _linear(name: str, outputs: int, inputs: int, *, bias: bool = False) -> list[Param]:
    found = [Param(f"{name}.weight", (outputs, inputs), is_linear=True)]
    return [*found, Param(f"{name}.bias", (outputs,))] if bias else found


def _attention(s: Sizes, *, bias: bool = False, out_bias: bool = False) -> list[Param]:
    return [
        *_linear("self_attn.q_proj", s.queries, s.hidden, bias=bias),
        *_linear("self_attn.k_proj", s.keys, s.hidden, bias=bias),
        *_linear("self_attn.v_proj", s.keys, s.hidden, bias=bias),
        *_linear("self_attn.o_proj", s.hidden, s.queries, bias=out_bias),
    ]


def _head_norms(queries: int, keys: int) -> list[Param]:
    return [Param("self_attn.q_norm.weight", (queries,)), Param("self_attn.k_norm.weight", (keys,))]


def _gated(s: Sizes) -> list[Param]:
    return [
        *_linear("mlp.gate_proj", s.inner, s.hidden),
        *_linear("mlp.up_proj", s.inner, s.hidden),
        *_linear("mlp.down_proj", s.hidden, s.inner),
    ]


def _norms(s: Sizes, *names: str, bias: bool = False) -> list[Param]:
    kinds = ("weight", "bias") if bias else ("weight",)
    return [Param(f"{name}.{kind}", (s.hidden,)) for name in names for kind in kinds]


def _experts(s: Sizes, prefix: str, gate: str, up: str, down: str) -> list[Param]:
    """Two stacks, which are stored expert by expert; gate and up are one matrix in the model."""
    each = [f"{prefix}.{k}" for k in range(s.experts)]
    both = tuple(f"{at}.{part}.weight" for at in each for part in (gate, up))
    return [
        Param("mlp.experts.gate_up_proj", (s.experts, 2 * s.inner, s.hidden), stored=both),
        Param(
            "mlp.experts.down_proj", (s.experts, s.hidden, s.inner), stored=tuple(f"{at}.{down}.weight" for at in each)
        ),
    ]


_TWO = ("input_layernorm", "post_attention_layernorm")
_FOUR = (*_TWO, "pre_feedforward_layernorm", "post_feedforward_layernorm")


def _llama(s: Sizes) -> list[Param]:
    return [*_attention(s), *_gated(s), *_norms(s, *_TWO)]


def _qwen2(s: Sizes) -> list[Param]:
    return [*_attention(s, bias=True), *_gated(s), *_norms(s, *_TWO)]


def _qwen3(s: Sizes) -> list[Param]:
    return [*_attention(s), *_head_norms(s.head_dim, s.head_dim), *_gated(s), *_norms(s, *_TWO)]


def _gemma2(s: Sizes) -> list[Param]:
    return [*_attention(s), *_gated(s), *_norms(s, *_FOUR)]


def _gemma3(s: Sizes) -> list[Param]:
    return [*_attention(s), *_head_norms(s.head_dim, s.head_dim), *_gated(s), *_norms(s, *_FOUR)]


def _phi3(s: Sizes) -> list[Param]:
    return [
        *_linear("self_attn.o_proj", s.hidden, s.queries),
        *_linear("self_attn.qkv_proj", s.queries + 2 * s.keys, s.hidden),
        *_linear("mlp.gate_up_proj", 2 * s.inner, s.hidden),
        *_linear("mlp.down_proj", s.hidden, s.inner),
        *_norms(s, *_TWO),
    ]


def _starcoder2(s: Sizes) -> list[Param]:
    return [
        *_attention(s, bias=True, out_bias=True),
        *_linear("mlp.c_fc", s.inner, s.hidden, bias=True),
        *_linear("mlp.c_proj", s.hidden, s.inner, bias=True),
        *_norms(s, *_TWO, bias=True),
    ]


def _cohere(s: Sizes) -> list[Param]:
    return [*_attention(s), *_gated(s), *_norms(s, "input_layernorm")]


def _olmo2(s: Sizes) -> list[Param]:
    norms = _norms(s, "post_attention_layernorm", "post_feedforward_layernorm")
    return [*_attention(s), *_head_norms(s.queries, s.keys), *_gated(s), *norms]


def _mixtral(s: Sizes) -> list[Param]:
    router = Param("mlp.gate.weight", (s.experts, s.hidden), stored=("block_sparse_moe.gate.weight",))
    experts = _experts(s, "block_sparse_moe.experts", "w1", "w3", "w2")
    return [*_attention(s), router, *experts, *_norms(s, *_TWO)]


def _qwen3_moe(s: Sizes) -> list[Param]:
    experts = _experts(s, "mlp.experts", "gate_proj", "up_proj", "down_proj")
    router = Param("mlp.gate.weight", (s.experts, s.hidden))
    return [*_attention(s), *_head_norms(s.head_dim, s.head_dim), *experts, router, *_norms(s, *_TWO)]


_NO_BIAS = {"attention_bias": False}

DECODERS: Mapping[str, Decoder] = {
    "llama": Decoder(layer=_llama, only=_NO_BIAS | {"mlp_bias": False}),
    "mistral": Decoder(layer=_llama),
    "qwen2": Decoder(layer=_qwen2),
    "qwen3": Decoder(layer=_qwen3, has_head_dim=True, only=_NO_BIAS),
    "gemma2": Decoder(layer=_gemma2, is_tied=True, has_head_dim=True, only=_NO_BIAS),
    "gemma3_text": Decoder(layer=_gemma3, is_tied=True, has_head_dim=True, only=_NO_BIAS),
    "phi3": Decoder(layer=_phi3),
    "starcoder2": Decoder(layer=_starcoder2, is_tied=True, norm_bias=True, only={"use_bias": True}),
    "cohere": Decoder(layer=_cohere, is_tied=True, only=_NO_BIAS | {"use_qk_norm": False}),
    "olmo2": Decoder(layer=_olmo2, only=_NO_BIAS),
    "mixtral": Decoder(layer=_mixtral),
    "qwen3_moe": Decoder(
        layer=_qwen3_moe, has_head_dim=True, only=_NO_BIAS | {"decoder_sparse_step": 1, "mlp_only_layers": []}
    ),
}
