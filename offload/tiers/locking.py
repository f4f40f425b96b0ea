"""A file that one process has to itself for as long as it has it open."""

from __future__ import annotations

import fcntl
from pathlib import Path

from offload.errors import StorageError, UsageError


def lock(fd: int, path: Path, held: str) -> None:
    """Locks an open file; the system unlocks it when it is closed.

    Args:
        path: named in errors.
        held: what to say where another process has it.

    Raises:
        UsageError: another process has it.
        StorageError: it cannot be locked, such as on some network file systems.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(held) from None
    except OSError as error:
        raise StorageError(f"cannot be locked: {error.strerror}", path=str(path), errno=error.errno) from error
