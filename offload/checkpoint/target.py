"""Where a packed checkpoint may be written: a folder with nothing in it, on a disk with room."""

from __future__ import annotations

import shutil
from pathlib import Path

from offload.checkpoint.finding import MANIFEST
from offload.errors import StorageError, UsageError
from offload.units import format_bytes


def check_target(directory: Path, out: Path, need: int) -> None:
    """Whether the checkpoint in `directory` may be packed into `out`.

    Args:
        need: bytes that will be written, about.

    Raises:
        UsageError: `out` has something in it, or the checkpoint is packed already.
        StorageError: there is no room.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists already; name a folder that does not, or an empty one")
    if (directory / MANIFEST).is_file():
        raise UsageError(f"{directory} is packed already; pack the checkpoint that it was made from")
    free = shutil.disk_usage(next(p for p in (out, *out.absolute().parents) if p.exists())).free
    if need > free:
        raise StorageError(
            f"packing needs about {format_bytes(need)} but {format_bytes(free)} are free; free some space or name "
            "another folder",
            path=str(out),
        )
