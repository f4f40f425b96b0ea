"""Checkpoints of real architectures with random weights, made once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers


def make(folder: Path, sizes: Mapping[str, Any]) -> Path:
    """A bf16 checkpoint in `folder`, unless it is there; the same weights every time.

    Args:
        sizes: of a transformers configuration, and the name of its class as `config`.
    """
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        return folder
    options = {name: value for name, value in sizes.items() if name != "config"}
    config = getattr(transformers, sizes["config"])(**options, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.generation_config.eos_token_id = None
    part = folder.with_name(folder.name + ".part")
    model.save_pretrained(part)
    part.rename(folder)
    return folder
