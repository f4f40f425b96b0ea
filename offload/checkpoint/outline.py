"""A model in outline: its module tree on meta, where each of its tensors lies, and its numbers. No weight is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offload.checkpoint.conversion import locate
from offload.checkpoint.describe import describe
from offload.checkpoint.headers import read_headers
from offload.checkpoint.manifest import read_manifest
from offload.checkpoint.packable import packable
from offload.checkpoint.parameters import by_parameter
from offload.checkpoint.skeleton import build, read_config, resolve_dtype
from offload.errors import CheckpointError, UsageError
from offload.io.extents import Extent
from offload.io.safetensors import Checkpoint
from offload.kernels.formats.weights import WeightFormat
from offload.runtime.discovery import Anatomy, dissect
from offload.specs import ModelSpec
from offload.tiers.layout import Piece, Source


@dataclass(frozen=True, kw_only=True)
class Outline:
    """What is known of a model without reading a weight.

    Attributes:
        model: the transformers model; parameters on meta, buffers real.
        anatomy: its units.
        located: what is stored, parameters and buffers, by name in the model's state dict.
        sources: parameter name -> where it is stored.
        spec: the same as numbers.
        weights: the name of the format that packed matrices have, or "none".
        basis: headers, or config where there are no headers and sizes follow from the configuration alone.
    """

    model: nn.Module
    anatomy: Anatomy
    located: dict[str, Source]
    sources: dict[str, Source]
    spec: ModelSpec
    weights: str
    basis: str


def outline(
    directory: Path,
    checkpoint: Checkpoint | None,
    *,
    dtype: str | torch.dtype = "auto",
    weights: WeightFormat | None = None,
    is_same: Callable[[Source, Source], bool] = lambda a, b: True,
    **model_kwargs: Any,
) -> Outline:
    """Builds the model and finds its tensors.

    Args:
        directory: with config.json.
        checkpoint: its files' headers; None: every parameter is as the configuration makes it, stored as it is used.
        dtype, weights, model_kwargs: as for `open_checkpoint`.
        is_same: whether two stored tensors hold the same values.

    Raises:
        CheckpointError: something is missing, broken or does not fit.
        ModelError: it is stored in a layout that cannot be streamed.
    """
    config = read_config(directory)
    entries = checkpoint.entries if checkpoint is not None else {}
    stored = Counter(e.dtype for e in entries.values()).most_common(1)
    manifest = read_manifest(directory)
    wanted = resolve_dtype(dtype, config, stored[0][0] if stored else None)
    if manifest is not None and wanted != (native := resolve_dtype("auto", config, None)):
        raise UsageError(f"dtype={dtype!r}: this checkpoint was packed as {native}; use the one it was packed from")
    model = build(config, wanted, **model_kwargs)
    anatomy = dissect(model)
    if checkpoint is None:
        located = _nominal(anatomy, wanted)
    elif manifest is not None:
        located = manifest.locate(entries, weights)
    else:
        located = locate(model, entries, wanted)
    sources = by_parameter(model, anatomy, located, is_same)
    if weights is not None and manifest is None:
        for name in packable(anatomy, sources, config, weights, blocks_only=True):
            sources[name] = replace(sources[name], form=weights.form(sources[name].shape))
    return Outline(
        model=model,
        anatomy=anatomy,
        located=located,
        sources=sources,
        spec=describe(anatomy, sources, getattr(model, "config", None)),
        weights=manifest.weights if manifest is not None else str(weights or "none"),
        basis="config" if checkpoint is None else "headers",
    )


def sketch(
    directory: Path, *, dtype: str | torch.dtype = "auto", weights: WeightFormat | None = None, **model_kwargs: Any
) -> Outline:
    """The outline of a model whose weights need not be here: headers suffice, and without them the configuration.

    Raises:
        CheckpointError, ModelError: see `outline`.
    """
    headers = read_headers(directory)
    checkpoint = headers.checkpoint
    if checkpoint is None and read_manifest(directory) is not None:
        which = headers.notes[0] if headers.notes else "no headers beside it"
        raise CheckpointError(f"{directory} has the manifest of a packed checkpoint, but {which}")
    return outline(directory, checkpoint, dtype=dtype, weights=weights, **model_kwargs)


def _nominal(anatomy: Anatomy, dtype: torch.dtype) -> dict[str, Source]:
    """Every parameter as one plain piece: what a checkpoint would hold that stores what the model uses."""
    located = {}
    for name, owners in anatomy.owners.items():
        parameter = owners[0].module._parameters[owners[0].attribute]
        assert parameter is not None
        shape = tuple(parameter.shape)
        piece = Piece(Extent("", 0, prod(shape) * dtype.itemsize), dtype, 0, prod(shape))
        located[name] = Source(name, dtype, shape, (piece,))
    return located
