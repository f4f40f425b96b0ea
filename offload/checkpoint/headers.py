"""The headers of a checkpoint whose weights need not be here, and what a run would miss of its files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from offload.io.checkpoint import Checkpoint, indexed_shards, read_checkpoint
from offload.units import format_bytes

NAMED = 3  # files; the others are counted


@dataclass(frozen=True, kw_only=True)
class Headers:
    """What there is for a plan.

    Attributes:
        checkpoint: None where not every file is here, and the configuration must do.
        notes: what a run would miss, a sentence each.
    """

    checkpoint: Checkpoint | None = None
    notes: tuple[str, ...] = ()


def read_headers(directory: Path) -> Headers:
    """The headers in a folder, which may hold none.

    Raises:
        CheckpointError, FormatError, StorageError: see `read_checkpoint`.
    """
    if not any(directory.glob("*.safetensors")):
        return Headers()
    shards = indexed_shards(directory)
    if missing := [name for name in shards if not (directory / name).exists()]:
        what = f"{len(missing)} of {len(shards)} shards are not here ({_some(missing)})"
        return Headers(notes=(f"{what}: sizes follow from config.json, and a run needs them all",))
    checkpoint = read_checkpoint(directory, is_whole=False)
    return Headers(checkpoint=checkpoint, notes=_shortfalls(checkpoint))


def _shortfalls(checkpoint: Checkpoint) -> tuple[str, ...]:
    begins: dict[str, int] = {}
    ends: dict[str, int] = {}
    for entry in checkpoint.entries.values():
        begins[entry.path] = min(begins.get(entry.path, entry.offset), entry.offset)
        ends[entry.path] = max(ends.get(entry.path, 0), entry.offset + entry.nbytes)
    sizes = {path: os.path.getsize(path) for path in ends}
    short = [path for path, end in ends.items() if sizes[path] < end]
    if not short:
        return ()
    if all(sizes[path] <= begins[path] for path in ends):
        return ("only headers are here, no weights: enough for a plan, not for a run",)
    said = [f"{os.path.basename(p)}: {format_bytes(sizes[p])} of {format_bytes(ends[p])}" for p in short]
    be = "is" if len(short) == 1 else "are"
    return (f"{len(short)} of {len(ends)} files {be} cut short ({_some(said)}): a run needs all bytes",)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f", and {len(names) - NAMED:,} more" if len(names) > NAMED else "")
