"""Which weights a checkpoint holds, told by sizes, headers and a page here and there: a fraction of a second."""

from __future__ import annotations

import hashlib
import os
from typing import Any

from offload.errors import StorageError
from offload.io.safetensors import Checkpoint

PAGE = 4096
PAGES = 2048  # of all files together: 8 MiB, a fraction of a second


def fingerprint(checkpoint: Checkpoint) -> str:
    """A text that the same files have wherever they lie, and that other weights in their place do not.

    Pages at equal distances over all files are looked at. Training changes them all; what changes a few rows of one
    matrix, and no size, may go unseen.

    Raises:
        StorageError: a file cannot be read.
    """
    files = {path: number for number, path in enumerate(checkpoint.files)}
    headers, weights = hashlib.sha256(), hashlib.sha256()
    for e in checkpoint.entries.values():
        headers.update(f"{e.name} {e.dtype} {e.shape} {files[e.path]} {e.offset}\n".encode())
    stride = max(PAGE, checkpoint.nbytes // PAGES)
    nbytes = sum(_sample(path, stride, weights) for path in files)
    return (
        f"{nbytes:,} bytes in {len(files)} file{'s' if len(files) > 1 else ''}, "
        f"headers {headers.hexdigest()[:12]}, weights {weights.hexdigest()[:12]}"
    )


def _sample(path: str, stride: int, digest: Any) -> int:
    """Adds a file's pages to a digest; returns its bytes."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # nothing is to be read ahead
            nbytes = os.fstat(fd).st_size
            for at in range(0, nbytes, stride):
                digest.update(os.pread(fd, PAGE, at))
        finally:
            os.close(fd)
    except OSError as error:
        raise StorageError(f"cannot be read: {error.strerror}", path=path, errno=error.errno) from error
    return nbytes
