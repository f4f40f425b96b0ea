"""The ways to move bytes, by name. All keep one contract (backends/base.py) and pass one set of tests."""

from __future__ import annotations

import importlib

from offload.errors import UsageError
from offload.io.backends.base import Backend, Block, Files, FileStatus

__all__ = ["BACKENDS", "Backend", "Block", "FileStatus", "Files", "create", "probe"]

BACKENDS: dict[str, str] = {
    "threads": "offload.io.backends.threads",  # preadv and pwritev in threads: the default
    "uring": "offload.io.backends.uring",  # io_uring, where the kernel offers it
    "aiofiles": "offload.io.backends.aio",  # the portable one
    "fake": "offload.io.backends.fake",  # files in memory, faults on demand
}
"""Name -> the module that holds `probe()` and `create(threads)`; imported only when asked for."""


def probe(name: str) -> str | None:
    """None when the backend can be used here, else the reason why not. Raises UsageError for an unknown name."""
    reason: str | None = importlib.import_module(_module(name)).probe()
    return reason


def create(name: str, *, threads: int) -> Backend:
    """A backend with up to `threads` reads in flight.

    Raises:
        UsageError: the name is unknown, or the backend cannot be used here; the message says why.
    """
    reason = probe(name)
    if reason is not None:
        raise UsageError(f"the I/O backend {name!r} cannot be used here: {reason}; use backend='threads'")
    backend: Backend = importlib.import_module(_module(name)).create(threads)
    return backend


def _module(name: str) -> str:
    if name not in BACKENDS:
        raise UsageError(f"there is no I/O backend {name!r}; known are {', '.join(n for n in BACKENDS if n != 'fake')}")
    return BACKENDS[name]
