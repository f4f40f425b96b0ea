"""Weights of one step in a file: images of memory, written while the model runs and read back as one run each."""

from __future__ import annotations

import errno
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import count
from math import prod
from pathlib import Path
from typing import Any

import torch

from offload.errors import CheckpointError, StorageError
from offload.io.buffers import BufferPool, Lease
from offload.io.engine import Engine, File
from offload.io.extents import ALIGNMENT, Extent
from offload.tiers.host import as_tensor
from offload.tiers.layout import Piece, Source
from offload.units import MIB, format_bytes

Checksum = Callable[[torch.Tensor], str]
MOST = 16 * MIB  # bytes of an area that one checksum is of


@dataclass(frozen=True)
class Base:
    """What a finished file holds.

    Attributes:
        file: its name in the folder of the state.
        step: how many updates its weights have in them.
        places: tensor -> its first byte.
        areas: first byte, bytes and checksum of every part that was written.
    """

    file: str
    step: int
    places: Mapping[str, int]
    areas: Sequence[tuple[int, int, str]]

    def sources(self, folder: Path, like: Mapping[str, Source]) -> dict[str, Source]:
        """Its tensors as stored ones, of the shapes and dtypes of `like`."""
        found = {}
        for name, at in self.places.items():
            source = like[name]
            elements = prod(source.shape)
            extent = Extent(os.path.abspath(folder / self.file), at, elements * source.dtype.itemsize)
            found[name] = Source(name, source.dtype, source.shape, (Piece(extent, source.dtype, 0, elements),))
        return found

    def verify(self, folder: Path, engine: Engine, checksum: Checksum) -> None:
        """Reads all of it.

        Raises:
            CheckpointError: something is not what was written.
            StorageError: it cannot be read.
        """
        path, pool = folder / self.file, BufferPool(2, MOST)
        file = engine.open(path)
        flights: deque[tuple[Lease, Future[int], int, int, str]] = deque()

        def land() -> None:
            lease, future, at, nbytes, expected = flights.popleft()
            future.result()
            if checksum(as_tensor(lease.view[:nbytes])) != expected:
                raise CheckpointError(
                    f"{path} is damaged: bytes {at:,} to {at + nbytes:,} are not what was written there. Restore the "
                    "folder from a copy, or start again"
                )
            lease.release()

        try:
            for at, nbytes, expected in self.areas:
                lease = pool.lease()
                flights.append((lease, engine.read(file, at, lease.view[:nbytes]), at, nbytes, expected))
                if len(flights) == 2:
                    land()
            while flights:
                land()
        finally:
            for _, future, *_ in flights:
                future.exception()
            file.close()
            pool.close()

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"file": self.file, "step": self.step, "places": dict(self.places), "areas": [*map(list, self.areas)]}

    @staticmethod
    def from_dict(found: Mapping[str, Any]) -> Base:
        """Back from JSON."""
        areas = [(int(at), int(nbytes), str(checksum)) for at, nbytes, checksum in found["areas"]]
        return Base(found["file"], found["step"], dict(found["places"]), areas)


class Images:
    """A file that is being written. Nothing refers to it before its base is committed.

    Args:
        folder: of the state.
        step: see Base.
        nbytes: name of an area -> its bytes, multiples of 4096.
        engine: writes it.
        checksum: of bytes.

    Raises:
        StorageError: the folder has no room.
    """

    def __init__(self, folder: Path, step: int, nbytes: Mapping[str, int], engine: Engine, checksum: Checksum) -> None:
        self.step, self._engine, self._checksum = step, engine, checksum
        self.offsets: dict[str, int] = {}
        end = 0
        for name, size in nbytes.items():
            assert size % ALIGNMENT == 0, (name, size)
            self.offsets[name] = end
            end += size
        self.nbytes = end
        self.write_s = 0.0  # how long areas took, one after the other
        self._writes: dict[str, list[Future[int]]] = {}
        self._areas: list[tuple[int, int, str]] = []
        self._places: dict[str, int] = {}
        path = next(p for k in count() if not (p := folder / f"weights-{step}-{k}.bin").exists())
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            if end:
                os.posix_fallocate(fd, 0, end)
        except OSError as error:
            os.close(fd)
            path.unlink()
            room = f"offload_dir has no room for {format_bytes(end)} of weights; free some space"
            raise StorageError(
                room if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error.strerror),
                path=str(folder), errno=error.errno,
            ) from error  # fmt: skip
        self.path = path
        self.file: File = engine.open(path, writable=True, fd=fd)

    def write(self, name: str, view: memoryview, places: Mapping[str, int]) -> None:
        """Starts writing an area; the view is lent until `wait`.

        Args:
            places: tensor -> its first byte in the area.
        """
        offset, began = self.offsets[name], time.perf_counter()
        futures: list[Future[int]] = []
        for at in range(0, len(view), MOST):
            part = view[at : at + MOST]
            self._areas.append((offset + at, len(part), self._checksum(as_tensor(part))))
            futures.append(self._engine.write(self.file, offset + at, part))
        futures[-1].add_done_callback(lambda _: self._add(time.perf_counter() - began))
        self._writes[name] = futures
        self._places |= {tensor: offset + at for tensor, at in places.items()}

    def wait(self, name: str) -> None:
        """Waits until an area is written. Raises StorageError."""
        for future in (futures := self._writes.pop(name, [])):
            future.exception()  # none may be in flight when one has failed
        for future in futures:
            future.result()

    def _add(self, seconds: float) -> None:
        self.write_s += seconds

    def finish(self) -> Base:
        """What was written. It is durable only after `sync`."""
        assert not self._writes, list(self._writes)
        return Base(self.path.name, self.step, self._places, self._areas)

    def sync(self) -> None:
        """Makes it durable. Raises StorageError."""
        self._engine.fsync(self.file)

    def abandon(self) -> None:
        """Waits for what is being written and removes the file."""
        for futures in self._writes.values():
            for future in futures:
                future.exception()
        self._writes.clear()
        self.file.close()
        self.path.unlink(missing_ok=True)
