"""Gradients and weights that wait on disk for their next use within a run: scratch, of which no commit knows.

The file has no name, so that nothing is left of it, however the process ends. Its checksums are in memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path

from offload.errors import CheckpointError, StorageError
from offload.io.engine import Engine, File
from offload.io.extents import ALIGNMENT
from offload.tiers.host import as_tensor
from offload.tiers.statefile import Checksum
from offload.tiers.swap import unlinked_file
from offload.units import format_bytes


class Spill:
    """A place for every cell. Not safe for threads, but that `read` may be called in another one.

    Args:
        folder: on the disk to use.
        engine: moves the bytes.
        cells: cell name -> bytes.
        checksum: of bytes.
    """

    def __init__(self, folder: Path, engine: Engine, cells: Mapping[str, int], checksum: Checksum) -> None:
        self._folder, self._engine, self._checksum = folder, engine, checksum
        self._nbytes = {name: -(-nbytes // ALIGNMENT) * ALIGNMENT for name, nbytes in cells.items()}
        self._at: dict[str, int] = {}
        end = 0
        for name, nbytes in self._nbytes.items():
            self._at[name] = end
            end += nbytes
        self._file: File | None = None
        self._has_room: set[str] = set()
        self._sums: dict[str, str] = {}
        self._pending: dict[str, Future[int]] = {}

    def take_room(self, names: Iterable[str]) -> None:
        """Takes the room of these cells from the disk, so that a full one is met before training begins.

        Raises:
            StorageError: there is no room.
        """
        for name in names:
            if name in self._has_room:
                continue
            if self._file is None:
                path, fd = unlinked_file(self._folder, 0)
                self._file = self._engine.open(path, writable=True, fd=fd)  # the descriptor is its own from here on
            fd, _ = self._file.descriptor()
            try:
                os.posix_fallocate(fd, self._at[name], self._nbytes[name])
            except OSError as error:
                raise StorageError(
                    f"offload_dir has no room for {format_bytes(sum(self._nbytes.values()))} of gradients that do not "
                    "stay in memory; free some space, raise cpu_memory, or name another folder",
                    path=str(self._folder), errno=error.errno,
                ) from error  # fmt: skip
            self._has_room.add(name)

    def write(self, name: str, view: memoryview) -> Future[int]:
        """Starts writing a cell; the view, of whole pages, is lent until it is done."""
        self.take_room([name])
        assert self._file is not None
        self._land(name)
        data = view[: self._nbytes[name]]
        self._sums[name] = self._checksum(as_tensor(data))
        self._pending[name] = future = self._engine.write(self._file, self._at[name], data)
        return future

    def read(self, name: str, view: memoryview) -> Future[int]:
        """Starts reading what was written last. Waits for that write, if it is under way."""
        assert self._file is not None, f"{name} was never written"
        self._land(name)
        return self._engine.read(self._file, self._at[name], view[: self._nbytes[name]])

    def verify(self, name: str, view: memoryview) -> None:
        """Compares what was read with what was written. Raises CheckpointError."""
        if self._checksum(as_tensor(view[: self._nbytes[name]])) != self._sums[name]:
            raise CheckpointError(
                f"the gradient or the weights of {name}, which were written to {self._folder} in this run, came back "
                "damaged. Go on from the last commit with resume, and have the disk looked at"
            )

    def drain(self) -> None:
        """Waits for what is being written, and forgets the memory that it came from."""
        for name in list(self._pending):
            self._land(name)

    def close(self) -> None:
        """Waits for what is being written and lets the file go, and with it what it holds."""
        for future in self._pending.values():
            future.exception()
        if self._file is not None:
            self._file.close()

    def _land(self, name: str) -> None:
        pending = self._pending.pop(name, None)
        if pending is not None:
            pending.result()
