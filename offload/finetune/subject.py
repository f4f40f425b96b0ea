"""What is trained: modules, their parameters, and where weights come from and go to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offload.runtime.discovery import Anatomy
from offload.runtime.streams import Streams
from offload.tiers.cells import Shapes

Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Attributes:
    root: the model; its parameters may be on meta.
    anatomy: from `dissect(root, shares=False)`.
    parameters: dtype and shape of each that is trained.
    fill: puts initial weights into tensors by name; called several times, each with some of them.
    save: writes the model, given its weights, to a folder.
    put_back: gets the last weights when the trainer is closed, unless a step failed; None: nobody wants them.
    streams: all other parameters, which are frozen; filled.
    belongs: what else the state belongs to, beside parameters and optimizer.
    """

    root: nn.Module
    anatomy: Anatomy
    parameters: Shapes
    fill: Callable[[Weights], None]
    save: Callable[[Weights, Path], None]
    put_back: Callable[[Weights], None] | None = None
    streams: Streams | None = None
    belongs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def travels(self) -> bool:
        """Whether weights may travel where they do not fit in memory: not those of a module that is there already, nor
        adapters, which are few."""
        return self.put_back is None and self.streams is None
