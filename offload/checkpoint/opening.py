"""Opens a transformers checkpoint for streaming: the model on meta, and where each of its tensors lies. Reads headers
and small buffers only."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offload.checkpoint.describe import describe
from offload.checkpoint.outline import outline
from offload.checkpoint.packable import packable
from offload.errors import CheckpointError
from offload.io.buffers import Buffer
from offload.io.engine import Engine
from offload.io.safetensors import Checkpoint, read_checkpoint
from offload.kernels.formats.weights import WeightFormat
from offload.runtime.discovery import Anatomy
from offload.specs import ModelSpec
from offload.tiers.bundle_reads import read_bundle
from offload.tiers.host import as_tensor
from offload.tiers.layout import Source, lay_out
from offload.tiers.open_files import OpenFiles
from offload.tiers.transit import is_same


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A checkpoint that is ready to be placed.

    Attributes:
        model: the transformers model; parameters on meta, buffers real.
        anatomy: its units.
        sources: parameter name -> where it is stored.
        spec: the same as numbers.
        checkpoint: the files.
        weights: the name of the format that packed matrices have, or "none".
    """

    model: nn.Module
    anatomy: Anatomy
    sources: dict[str, Source]
    spec: ModelSpec
    checkpoint: Checkpoint
    weights: str = "none"


def open_checkpoint(
    directory: Path,
    engine: Engine,
    *,
    dtype: str | torch.dtype = "auto",
    weights: WeightFormat | None = None,
    **model_kwargs: Any,
) -> Opened:
    """Builds the model and finds its tensors.

    Args:
        directory: with config.json and safetensors.
        engine: reads the few buffers that a checkpoint stores.
        dtype: of the parameters; "auto" takes the configuration's.
        weights: the format that matrices shall have which stay in memory; a packed checkpoint has its own.
        model_kwargs: handed to transformers, such as attn_implementation.

    Raises:
        CheckpointError: something is missing, broken or does not fit.
        ModelError: it is stored in a layout that cannot be streamed.
    """
    checkpoint = read_checkpoint(directory)
    sketch = outline(
        directory, checkpoint, dtype=dtype, weights=weights, is_same=lambda a, b: is_same(a, b, engine), **model_kwargs
    )
    _load_buffers(sketch.model, sketch.located, engine)
    _take_generation_config(sketch.model, directory)
    return Opened(
        model=sketch.model,
        anatomy=sketch.anatomy,
        sources=sketch.sources,
        spec=sketch.spec,
        checkpoint=checkpoint,
        weights=sketch.weights,
    )


def packed(opened: Opened, weights: WeightFormat, takes: Callable[[tuple[int, ...]], bool]) -> Opened:
    """The same, had it been opened with this format for matrices that stay in memory, of the shapes that it takes."""
    config, sources = getattr(opened.model, "config", None), dict(opened.sources)
    for name in packable(opened.anatomy, sources, config, weights, blocks_only=True):
        if takes(sources[name].shape):
            sources[name] = replace(sources[name], form=weights.form(sources[name].shape))
    spec = describe(opened.anatomy, sources, config)
    return replace(opened, sources=sources, spec=spec, weights=str(weights))


def _load_buffers(model: nn.Module, located: Mapping[str, Source], engine: Engine) -> None:
    """Reads the buffers that the checkpoint stores; the others are as the constructor made them."""
    with OpenFiles(engine) as files:
        for name, _ in list(model.named_buffers()):
            source = located.get(name)
            if source is None:
                continue
            layout = lay_out([source])
            buffer = Buffer(layout.nbytes)
            read_bundle(layout, buffer.view, engine, files.__getitem__).result()
            path, _, attribute = name.rpartition(".")
            model.get_submodule(path)._buffers[attribute] = layout.views[name].of(as_tensor(buffer.view)).clone()


def _take_generation_config(model: Any, directory: Path) -> None:
    from transformers import GenerationConfig

    if hasattr(model, "generation_config") and (directory / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(directory, local_files_only=True)
        except (OSError, ValueError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{directory}/generation_config.json cannot be used: {error}") from error
    if hasattr(model, "name_or_path"):
        model.name_or_path = os.fspath(directory)
