"""Tiny random models of real architectures, saved in shards of 100 KB so that every one is many files."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

_COMMON: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 5, "num_attention_heads": 4,
    "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_GQA = _COMMON | {"num_key_value_heads": 2}


_made: dict[str, Path] = {}


@functools.cache
def _folder() -> str:
    """Where this process keeps what it has made."""
    folder = tempfile.mkdtemp(prefix="offload-models-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@dataclass(frozen=True)
class Tiny:
    """A configuration class by name, and its sizes."""

    config: str
    sizes: dict[str, Any]

    def save(self, directory: Path, dtype: torch.dtype = torch.float32) -> Path:
        """Saves the model with random weights, the same every time: it is made once a process, then copied."""
        key = f"{self} {dtype}"
        if key not in _made:
            _made[key] = self._make(Path(tempfile.mkdtemp(dir=_folder())), dtype)
        shutil.copytree(_made[key], directory, dirs_exist_ok=True)
        torch.manual_seed(0)  # what a test draws next must not depend on who made the model
        return directory

    def _make(self, directory: Path, dtype: torch.dtype) -> Path:
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**self.sizes)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # norms and biases too: none may stay at a value that hides a mistake
                parameter.add_(torch.randn_like(parameter) * 0.02)
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        model.save_pretrained(directory, max_shard_size="100KB")
        return directory


_BLOOM = {"vocab_size": 320, "hidden_size": 64, "n_layer": 5, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
_GPT2 = {"vocab_size": 320, "n_positions": 128, "n_embd": 64, "n_layer": 5, "n_head": 4, "bos_token_id": 1}

MODELS: dict[str, Tiny] = {
    "llama": Tiny("LlamaConfig", _GQA),
    "llama-tied": Tiny("LlamaConfig", _GQA | {"tie_word_embeddings": True, "vocab_size": 1200}),
    "mistral": Tiny("MistralConfig", _GQA | {"sliding_window": 8}),
    "qwen2": Tiny("Qwen2Config", _GQA),
    "qwen3": Tiny("Qwen3Config", _GQA | {"head_dim": 16}),
    "gemma2": Tiny("Gemma2Config", _GQA | {"head_dim": 16, "sliding_window": 8}),
    "gemma3": Tiny("Gemma3TextConfig", _GQA | {"head_dim": 16, "sliding_window": 8}),
    "phi3": Tiny("Phi3Config", _GQA),
    "gpt2": Tiny("GPT2Config", _GPT2 | {"eos_token_id": 2}),
    "gpt_neox": Tiny("GPTNeoXConfig", _COMMON),
    "opt": Tiny("OPTConfig", _COMMON | {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "bloom": Tiny("BloomConfig", _BLOOM),
    "falcon": Tiny("FalconConfig", _BLOOM | {"num_hidden_layers": 5, "num_attention_heads": 4}),
    "starcoder2": Tiny("Starcoder2Config", _GQA),
    "cohere": Tiny("CohereConfig", _GQA),
    "olmo2": Tiny("Olmo2Config", _GQA),
    "mixtral": Tiny("MixtralConfig", _GQA | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": Tiny(
        "Qwen3MoeConfig",
        _GQA | {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    ),
}
