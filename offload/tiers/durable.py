"""Small files that are either the old or the new one after a crash, never something between."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from offload.errors import StorageError


def write_durably(path: Path, data: bytes) -> None:
    """Replaces a file: written beside it, made durable, renamed, and the rename made durable.

    Raises:
        StorageError: something failed. Unless `renamed` is set on it, the file that was there before is there still;
            else nobody knows which of the two will be found after a crash.
    """
    partial = path.with_name(f".{path.name}.partial")
    renamed = False
    try:
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(fd, left) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(partial, path)
        renamed = True
        sync_folder(path.parent)
    except OSError as error:
        if not renamed:
            with contextlib.suppress(OSError):
                partial.unlink()
        found = StorageError(f"cannot be written: {error.strerror}", path=str(path), errno=error.errno)
        found.renamed = renamed  # type: ignore[attr-defined]
        raise found from error


def remove_durably(path: Path) -> None:
    """Removes a file, if it is there, so that a crash does not bring it back. Raises StorageError."""
    try:
        path.unlink(missing_ok=True)
        sync_folder(path.parent)
    except OSError as error:
        raise StorageError(f"cannot be removed: {error.strerror}", path=str(path), errno=error.errno) from error


def sync_folder(folder: Path) -> None:
    """Makes names in a folder durable. Raises OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
