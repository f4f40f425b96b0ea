"""Checkpoints of headers alone: models of any size in a few kilobytes, for plans."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Tensors = Iterable[tuple[str, tuple[int, ...]]]

LLAMA_70B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
MOE_160: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 4096, "head_dim": 128,
    "moe_intermediate_size": 1536, "intermediate_size": 12288, "num_hidden_layers": 60, "num_attention_heads": 64,
    "num_key_value_heads": 4, "num_experts": 160, "num_experts_per_tok": 8, "vocab_size": 151936,
    "max_position_embeddings": 32768, "decoder_sparse_step": 1, "mlp_only_layers": [], "tie_word_embeddings": False,
    "dtype": "bfloat16",
}  # fmt: skip


def tensors(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes as such a checkpoint stores them: experts one by one."""
    hidden, kv = config["hidden_size"], config["num_key_value_heads"]
    dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    experts = config.get("num_experts", 0)
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        heads = config["num_attention_heads"] * dim
        for name, shape in (("q", (heads, hidden)), ("k", (kv * dim, hidden)), ("v", (kv * dim, hidden))):
            yield f"{at}.self_attn.{name}_proj.weight", shape
        yield f"{at}.self_attn.o_proj.weight", (hidden, heads)
        if experts:
            yield f"{at}.self_attn.q_norm.weight", (dim,)
            yield f"{at}.self_attn.k_norm.weight", (dim,)
            yield f"{at}.mlp.gate.weight", (experts, hidden)
        wide = config["moe_intermediate_size"] if experts else config["intermediate_size"]
        for mlp in [f"{at}.mlp.experts.{e}" for e in range(experts)] or [f"{at}.mlp"]:
            yield f"{mlp}.gate_proj.weight", (wide, hidden)
            yield f"{mlp}.up_proj.weight", (wide, hidden)
            yield f"{mlp}.down_proj.weight", (hidden, wide)
        yield f"{at}.input_layernorm.weight", (hidden,)
        yield f"{at}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config["vocab_size"], hidden)


def write(directory: Path, config: dict[str, Any], *, shard_tensors: int = 4000) -> Path:
    """A checkpoint of config.json, an index and shards that end with their headers."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    everything = list(tensors(config))
    shards = [everything[k : k + shard_tensors] for k in range(0, len(everything), shard_tensors)]
    weight_map = {}
    for k, shard in enumerate(shards, 1):
        file = f"model-{k:05d}-of-{len(shards):05d}.safetensors"
        header: dict[str, Any] = {}
        end = 0
        for name, shape in shard:
            nbytes = 2
            for size in shape:
                nbytes *= size
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + nbytes]}
            end += nbytes
            weight_map[name] = file
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        (directory / file).write_bytes(len(raw).to_bytes(8, "little") + raw)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory
