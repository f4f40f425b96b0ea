"""Low-rank adapters (Hu et al., 2021): y = W x + (alpha / r) B A x, where W is frozen; saved as PEFT stores them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from offload.errors import ModelError, UsageError
from offload.finetune.export import export_tensors, stored
from offload.io.engine import Engine

A, B = "lora_A", "lora_B"  # parameters of the adapted module: [r, inputs] and [outputs, r]


@dataclass(frozen=True, kw_only=True)
class Lora:
    """What adapters are added.

    Attributes:
        r: their rank.
        lora_alpha: their output is scaled by lora_alpha / r.
        lora_dropout: share of their inputs that is zeroed in training.
        target_modules: "all-linear" is every nn.Linear but the model's head; or the last parts of module names.
    """

    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    target_modules: str | Sequence[str] = "all-linear"

    @property
    def adds(self) -> str:
        """What adapters compute: trained ones are of no use with another."""
        targets = self.target_modules
        where = targets if isinstance(targets, str) else ", ".join(sorted(targets))
        return f"r={self.r}, lora_alpha={self.lora_alpha:g}, of {where}"


def adapt(root: nn.Module, lora: Lora) -> dict[str, nn.Linear]:
    """Adds adapters, on meta, and freezes all else; returns the adapted modules by name.

    Raises:
        UsageError: no module has such a name.
        ModelError: it has no nn.Linear.
    """
    head = root.get_output_embeddings() if hasattr(root, "get_output_embeddings") else None
    linears = {n: m for n, m in root.named_modules() if type(m) is nn.Linear and m is not head}
    if not linears:
        raise ModelError("the model has no nn.Linear beside its head, and adapters are for those only")
    if isinstance(lora.target_modules, str):
        if lora.target_modules != "all-linear":
            raise UsageError(f'target_modules={lora.target_modules!r}: give "all-linear" or a list of names')
        targets = linears
    else:
        ends = {n.rpartition(".")[2] for n in linears}
        unknown = sorted(set(lora.target_modules) - ends)
        if unknown:
            raise UsageError(f"target_modules has {', '.join(unknown)}; there are {', '.join(sorted(ends))}")
        targets = {n: m for n, m in linears.items() if n.rpartition(".")[2] in lora.target_modules}
    for parameter in root.parameters():
        parameter.requires_grad_(False)
    for module in targets.values():
        for name, shape in ((A, (lora.r, module.in_features)), (B, (module.out_features, lora.r))):
            module.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=module.weight.dtype, device="meta")))
        module.forward = _forward(module, lora)  # type: ignore[method-assign]
    return targets


def begin(views: Mapping[str, torch.Tensor], seed: int) -> None:
    """First values: A as nn.Linear begins, B zero, so that nothing changes at first."""
    generator = torch.Generator().manual_seed(seed)
    for name in sorted(views):
        view = views[name]
        if name.endswith(B):
            view.zero_()
        else:
            bound = 1 / math.sqrt(view.shape[1])
            view.copy_(torch.rand(view.shape, generator=generator) * 2 * bound - bound)


def save_adapters(
    root: Any,
    lora: Lora,
    targets: Mapping[str, nn.Linear],
    views: Mapping[str, torch.Tensor],
    folder: Path,
    engine: Engine,
) -> None:
    """Writes adapter_model.safetensors and adapter_config.json, which PEFT loads, to an empty folder."""
    named = {f"base_model.model.{name}.weight": view for name, view in views.items()}
    export_tensors([stored(n, t) for n, t in named.items()], folder, engine, stem="adapter_model")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": os.fspath(getattr(root, "name_or_path", "") or ""),
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "target_modules": sorted({name.rpartition(".")[2] for name in targets}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))


def _forward(module: nn.Linear, lora: Lora) -> Callable[[torch.Tensor], torch.Tensor]:
    scale = lora.lora_alpha / lora.r

    def forward(x: torch.Tensor) -> torch.Tensor:
        y = functional.linear(x, module.weight, module.bias)
        dropped = functional.dropout(x, lora.lora_dropout, module.training)
        low = functional.linear(dropped, module._parameters[A])  # type: ignore[arg-type]
        return y + functional.linear(low, module._parameters[B]) * scale  # type: ignore[arg-type]

    return forward
