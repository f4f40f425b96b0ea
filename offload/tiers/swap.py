"""A swap file: scratch space for tensors that a user's module holds. Nothing of it survives the process.

The file never has a name (O_TMPFILE, mode 0600). Where the file system knows no such files, it lies in a folder of its
own (mode 0700), is created with O_EXCL and O_NOFOLLOW and is unlinked as soon as it is open. So neither an exit nor a
kill leaves a byte behind.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path

import torch

from offload.errors import StorageError
from offload.io.buffers import BufferPool, Lease
from offload.io.engine import Engine, File
from offload.io.extents import ALIGNMENT, Extent
from offload.tiers.host import as_tensor
from offload.tiers.layout import Piece, Source
from offload.tiers.slots import VIEW_ALIGNMENT
from offload.units import MIB, format_bytes

CHUNK = 8 * MIB


def swap_out(
    tensors: Mapping[str, torch.Tensor], directory: str | os.PathLike[str], engine: Engine
) -> tuple[dict[str, Source], File]:
    """Writes tensors to a new swap file and says where they are.

    A tensor keeps its address modulo 64 in the file, hence in every buffer it is read to: CPU kernels may round
    differently at another alignment.

    Args:
        tensors: contiguous CPU tensors by name.
        directory: on the disk to use; made if missing.
        engine: writes and later reads the file; closing it frees the space.

    Returns:
        Where each tensor lies, and the open file.

    Raises:
        StorageError: the folder is not writable or the disk is full. Nothing is left behind.
    """
    places, end = {}, 0
    for name, tensor in tensors.items():
        end = -(-end // VIEW_ALIGNMENT) * VIEW_ALIGNMENT + tensor.data_ptr() % VIEW_ALIGNMENT
        places[name] = end
        end += tensor.numel() * tensor.element_size()
    size = -(-end // ALIGNMENT) * ALIGNMENT
    path, fd = unlinked_file(Path(directory), size)
    file = engine.open(path, writable=True, fd=fd)
    pool = BufferPool(2, CHUNK)
    pending: list[tuple[Lease, Future[int]]] = []
    left = deque((at, tensors[name].detach().reshape(-1).view(torch.uint8)) for name, at in places.items())
    try:
        for start in range(0, size, CHUNK):
            if len(pending) == 2:
                _finish(pending)
            lease = pool.lease()
            nbytes = min(CHUNK, size - start)
            _copy(left, start, as_tensor(lease.view[:nbytes]))
            pending.append((lease, engine.write(file, start, lease.view[:nbytes])))
        while pending:
            _finish(pending)
    finally:
        for _, future in pending:
            future.exception()  # a slot may go only when nothing writes from it any more
        pool.close()
    sources = {}
    for name, tensor in tensors.items():
        extent = Extent(file.path, places[name], tensor.numel() * tensor.element_size())
        pieces = (Piece(extent, tensor.dtype, 0, tensor.numel()),)
        sources[name] = Source(name, tensor.dtype, tuple(tensor.shape), pieces)
    return sources, file


def unlinked_file(directory: Path, size: int) -> tuple[str, int]:
    """A file of `size` reserved bytes that has no name any more: (the name it had, its descriptor).

    Raises:
        StorageError: the folder is not writable or the disk is full. Nothing is left behind.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        path, fd = _open_unnamed(directory)
    except OSError as error:
        raise StorageError(
            f"offload_dir cannot be written to: {error.strerror}", path=str(directory), errno=error.errno
        ) from error
    try:
        if size:
            os.posix_fallocate(fd, 0, size)  # so that a full disk is met before anything is moved
    except OSError as error:
        os.close(fd)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StorageError(
                f"offload_dir has no room for {format_bytes(size)}; free some space or name another folder",
                path=str(directory),
                errno=error.errno,
            ) from error
        raise StorageError(f"{error.strerror}", path=str(directory), errno=error.errno) from error
    return str(path), fd


def _open_unnamed(directory: Path) -> tuple[Path, int]:
    """A new file that never had a name, where the file system knows such; else one whose name is gone at once."""
    try:
        fd = os.open(directory, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
        return directory / f"offload-{os.getpid()}-{fd}", fd
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
    folder = Path(tempfile.mkdtemp(prefix="offload-", dir=directory))  # mode 0700
    path = folder / "swap"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        path.unlink()
    finally:
        folder.rmdir()
    return path, fd


def _copy(sources: deque[tuple[int, torch.Tensor]], start: int, target: torch.Tensor) -> None:
    """Puts the bytes that belong at `start` of the file and behind it into `target`; drops tensors that end there.

    Args:
        sources: first byte in the file and bytes of each tensor that does not end before `start`, in their order.
    """
    end = start + target.numel()
    while sources and sources[0][0] < end:
        at, source = sources[0]
        begin, stop = max(at, start), min(at + source.numel(), end)
        target[begin - start : stop - start] = source[begin - at : stop - at]
        if at + source.numel() > end:
            return
        sources.popleft()


def _finish(pending: list[tuple[Lease, Future[int]]]) -> None:
    lease, future = pending[0]
    future.result()
    pending.pop(0)
    lease.release()
