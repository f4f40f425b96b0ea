"""Opens a transformers checkpoint for streaming: the model on meta, and where each of its tensors lies. Reads headers
and small buffers only."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offload.checkpoint.conversion import locate
from offload.checkpoint.describe import describe
from offload.checkpoint.manifest import read_manifest
from offload.checkpoint.packable import packable
from offload.checkpoint.skeleton import build, read_config, resolve_dtype
from offload.errors import CheckpointError, UsageError
from offload.io.buffers import Buffer
from offload.io.engine import Engine
from offload.io.safetensors import Checkpoint, read_checkpoint
from offload.kernels.formats.weights import WeightFormat
from offload.runtime.discovery import Anatomy, dissect
from offload.specs import ModelSpec
from offload.tiers.host import as_tensor
from offload.tiers.layout import Source, assemble, lay_out
from offload.tiers.transit import is_same

__all__ = ["Opened", "describe", "find", "open_checkpoint", "read_config"]


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


def find(model: str | os.PathLike[str]) -> Path:
    """The folder of a model: a path, or a hub id that is looked up in the cache and then downloaded.

    Raises:
        CheckpointError: there is no such folder and no such model can be had.
    """
    path = Path(model)
    if path.is_dir():
        return path
    text = os.fspath(model)
    if path.exists() or text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise CheckpointError(
            f"{text} is not a folder; a model is a folder with config.json and safetensors, or a hub id"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(text, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{text} is neither a folder here nor a model that could be downloaded: {reason}"
        ) from error


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
    config = read_config(directory)
    checkpoint = read_checkpoint(directory)
    stored = Counter(e.dtype for e in checkpoint.entries.values()).most_common(1)
    manifest = read_manifest(directory)
    wanted = resolve_dtype(dtype, config, stored[0][0] if stored else None)
    if manifest is not None and wanted != (native := resolve_dtype("auto", config, None)):
        raise UsageError(f"dtype={dtype!r}: this checkpoint was packed as {native}; use the one it was packed from")
    model = build(config, wanted, **model_kwargs)
    anatomy = dissect(model)
    if manifest is not None:
        located = manifest.locate(checkpoint.entries, weights)
    else:
        located = locate(model, checkpoint.entries, wanted)
    sources = _by_parameter(model, anatomy, located, engine)
    if weights is not None and manifest is None:
        for name in packable(anatomy, sources, config, weights, blocks_only=True):
            sources[name] = replace(sources[name], form=weights.form(sources[name].shape))
    _load_buffers(model, located, engine)
    _take_generation_config(model, directory)
    return Opened(
        model=model,
        anatomy=anatomy,
        sources=sources,
        spec=describe(anatomy, sources, getattr(model, "config", None)),
        checkpoint=checkpoint,
        weights=manifest.weights if manifest is not None else str(weights or "none"),
    )


def _by_parameter(model: nn.Module, anatomy: Anatomy, located: dict[str, Source], engine: Engine) -> dict[str, Source]:
    """One source for each parameter; a tied one may be stored under any of its names."""
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    sources, missing = {}, []
    for name, owners in anatomy.owners.items():
        names = {".".join(filter(None, (path, o.attribute))): None for o in owners for path in paths[id(o.module)]}
        found = [located[n] for n in names if n in located]
        if not found:
            missing.append(name)
            continue
        for other in found[1:]:
            if other.pieces != found[0].pieces and not is_same(found[0], other, engine):
                raise CheckpointError(
                    f"config.json ties {found[0].name} and {other.name}, but the checkpoint holds different values for "
                    'them; set "tie_word_embeddings": false in config.json if they are meant to differ'
                )
        sources[name] = replace(found[0], name=name)
    if missing:
        shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        raise CheckpointError(f"the checkpoint lacks {len(missing)} tensors that the model needs: {shown}")
    return sources


def _load_buffers(model: nn.Module, located: dict[str, Source], engine: Engine) -> None:
    """Reads the buffers that the checkpoint stores; the others are as the constructor made them."""
    for name, _ in list(model.named_buffers()):
        source = located.get(name)
        if source is None:
            continue
        layout = lay_out([source])
        buffer = Buffer(layout.nbytes)
        for op in layout.reads:
            view = buffer.view[layout.final_nbytes * op.is_staging + op.at :][: op.nbytes]
            engine.read(engine.open(op.path), op.offset, view, need=op.need).result()
        area = as_tensor(buffer.view)
        assemble(layout, area, area[layout.final_nbytes :])
        path, _, attribute = name.rpartition(".")
        model.get_submodule(path)._buffers[attribute] = layout.views[name].of(area).clone()


def _take_generation_config(model: Any, directory: Path) -> None:
    from transformers import GenerationConfig

    if hasattr(model, "generation_config") and (directory / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(directory, local_files_only=True)
        except (OSError, ValueError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{directory}/generation_config.json cannot be used: {error}") from error
    if hasattr(model, "name_or_path"):
        model.name_or_path = os.fspath(directory)
