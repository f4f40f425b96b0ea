"""Packs a checkpoint: its matrices in fewer bits, written once."""

from __future__ import annotations

import os
from pathlib import Path

from offload.checkpoint import find
from offload.checkpoint.pack import PackReport, pack_checkpoint
from offload.errors import UsageError
from offload.handle import Progress
from offload.io.engine import Engine
from offload.kernels.formats.weights import parse_weights


def pack(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    weights: str = "lossless",
    io: str = "threads",
    progress: Progress | None = None,
) -> PackReport:
    """Writes a checkpoint with its matrices in fewer bits to a new folder, which `load` takes like any other.

    It is written once and whole: an error, an interrupt or a kill leaves nothing behind.

    Args:
        model: a folder with config.json and safetensors, or a hub id.
        out: a folder that does not exist yet, or an empty one.
        weights: lossless, int8 or int4, see `parse_weights`.
        io: I/O backend: threads, uring or aiofiles.
        progress: called while it goes on.

    Raises:
        CheckpointError, UsageError, StorageError: see offload.errors.
    """
    format = parse_weights(weights)
    if format is None:
        raise UsageError("weights='none' is how the checkpoint is stored already; name lossless, int8 or int4")
    with Engine(io) as engine:
        return pack_checkpoint(find(model), Path(out), format, engine=engine, progress=progress)
