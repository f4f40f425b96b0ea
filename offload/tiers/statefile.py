"""Training state on disk: shards in two slots each, of which one is always the last commit's.

    state.bin   | slot 0 of every shard | slot 1 of every shard |      state.json   which slot of each is committed

Whatever a step writes goes to the slots that the last commit does not name, so that a crash at any instant leaves it as
it was. A commit waits for every write, makes them durable, and then replaces the manifest: a flip, not a copy. Every
shard that is read is compared with the checksum of what was written.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from offload.errors import CheckpointError, StorageError, UsageError
from offload.io.engine import Engine, File
from offload.io.extents import ALIGNMENT
from offload.tiers.commit import MANIFEST, Commit, read_commit, write_commit
from offload.tiers.durable import remove_durably
from offload.tiers.host import as_tensor
from offload.tiers.locking import lock
from offload.units import format_bytes

DATA = "state.bin"
Checksum = Callable[[torch.Tensor], str]


@dataclass(slots=True)
class _Shard:
    """Where a shard is, and what its newest bytes are.

    Attributes:
        at: its first byte within each half of the file.
        slot: the slot with the newest bytes; None before the first write.
        committed: the slot that the last commit names.
        generation: the step that the newest bytes belong to.
        pending: the write that brings them, while it may be in flight.
    """

    at: int
    nbytes: int
    slot: int | None = None
    committed: int | None = None
    generation: int = -1
    checksum: str = ""
    pending: Future[int] | None = None


class StateFile:
    """The shards of one training run. Lanes may read and write different shards at once; all else is for one thread.

    Args:
        folder: holds the manifest.
        file: the data, open for writing and as large as `room` says.
        engine: moves the bytes.
        shards: shard name -> bytes, multiples of 4096.
        identity: see Commit.
        checksum: of a shard's bytes.
        commit: the last one, for a run that goes on.

    Raises:
        CheckpointError: the commit belongs to something else.
    """

    def __init__(
        self,
        folder: Path,
        file: File,
        engine: Engine,
        shards: Mapping[str, int],
        identity: Mapping[str, Any],
        checksum: Checksum,
        commit: Commit | None = None,
    ) -> None:
        self._folder, self._file, self._engine, self._checksum = folder, file, engine, checksum
        self.identity = dict(identity)
        self._shards: dict[str, _Shard] = {}
        end = 0
        for name, nbytes in shards.items():
            assert nbytes % ALIGNMENT == 0, (name, nbytes)
            self._shards[name] = _Shard(end, nbytes)
            end += nbytes
        self._half = end
        self._broken: str | None = None
        self.step, self.extra, self.has_commit = 0, dict[str, Any](), commit is not None
        if commit is not None:
            self._take(commit)

    def nbytes(self, name: str) -> int:
        """Of a shard."""
        return self._shards[name].nbytes

    def read(self, name: str, view: memoryview, nbytes: int | None = None) -> Future[int]:
        """Starts reading the newest bytes of a shard. Waits for the write that brings them, if it is under way.

        Args:
            nbytes: the first so many, in whole pages; None: all.
        """
        shard = self._shards[name]
        assert shard.slot is not None, f"{name} was never written"
        if shard.pending is not None:
            shard.pending.result()
        return self._engine.read(self._file, self._offset(shard, shard.slot), view[: nbytes or shard.nbytes])

    def verify(self, name: str, view: memoryview) -> None:
        """Compares what was read with what was written.

        Raises:
            CheckpointError: they differ; names the shard, the file and the place.
        """
        shard = self._shards[name]
        if self._checksum(as_tensor(view[: shard.nbytes])) != shard.checksum:
            assert shard.slot is not None
            at = self._offset(shard, shard.slot)
            raise CheckpointError(
                f"the training state of {name} is damaged: bytes {at:,} to {at + shard.nbytes:,} of {self._file.path} "
                "are not what was written there. Restore the folder from a copy, or start again"
            )

    def write(self, name: str, view: memoryview, generation: int) -> Future[int]:
        """Starts writing a shard's new bytes to the slot that is not committed; the view is lent until it is done.

        Args:
            generation: the step that they belong to.
        """
        self._check_whole()
        shard = self._shards[name]
        if shard.pending is not None:
            shard.pending.result()
        data = view[: shard.nbytes]
        assert len(data) == shard.nbytes, (name, len(data), shard.nbytes)
        checksum = self._checksum(as_tensor(data))
        slot = 0 if shard.committed is None else 1 - shard.committed
        shard.slot, shard.generation, shard.checksum = slot, generation, checksum
        shard.pending = future = self._engine.write(self._file, self._offset(shard, slot), data)
        future.add_done_callback(self._ended)
        return future

    def commit(self, step: int, extra: Mapping[str, Any]) -> None:
        """Makes the newest bytes of every shard the state of `step`, durably.

        Raises:
            StorageError: something could not be written. The last commit holds; this file takes no more writes.
        """
        self._check_whole()
        old = [name for name, s in self._shards.items() if s.generation != step]
        assert not old, f"step {step} was to be committed, but {old[:3]} hold other steps"
        try:
            for shard in self._shards.values():
                if shard.pending is not None:
                    shard.pending.result()
                    shard.pending = None
            self._engine.fsync(self._file)
            shards = {name: (s.slot or 0, s.checksum) for name, s in self._shards.items()}
            write_commit(self._folder, Commit(step=step, shards=shards, identity=self.identity, extra=extra))
        except OSError as error:
            self._broken = self._broken or str(error)
            raise
        for shard in self._shards.values():
            shard.committed = shard.slot
        self.step, self.extra = step, dict(extra)

    def drain(self) -> None:
        """Waits for what is being written, whatever becomes of it."""
        for shard in self._shards.values():
            if shard.pending is not None:
                shard.pending.exception()

    def close(self) -> None:
        """Waits for what is being written and lets the file go. Does not commit."""
        self.drain()
        self._file.close()

    def _take(self, commit: Commit) -> None:
        """Goes on from a commit."""
        check_identity(commit.identity, self.identity)
        if commit.shards.keys() != self._shards.keys():
            raise CheckpointError(f"{self._folder / MANIFEST} is of other shards than this model has")
        for name, (slot, checksum) in commit.shards.items():
            shard = self._shards[name]
            shard.slot = shard.committed = slot
            shard.generation, shard.checksum = commit.step, checksum
        self.step, self.extra = commit.step, dict(commit.extra)

    def _offset(self, shard: _Shard, slot: int) -> int:
        return slot * self._half + shard.at

    def _ended(self, future: Future[int]) -> None:
        if future.cancelled() or future.exception() is not None:
            self._broken = self._broken or str(future.exception() if not future.cancelled() else "cancelled")

    def _check_whole(self) -> None:
        if self._broken is not None:
            raise StorageError(
                f"the training state was not written ({self._broken}); the last commit is step {self.step}. Put right "
                "what failed and go on from it with resume",
                path=self._file.path,
            )


def room(shards: Mapping[str, int]) -> int:
    """Bytes of the data file."""
    return 2 * sum(shards.values())


def check_identity(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises CheckpointError, with what differs, unless a commit belongs to this run."""
    for key, value in wanted.items():
        if found.get(key) != value:
            raise CheckpointError(
                f"the training state is of another run: its {key} is {found.get(key)!r}, this run's is {value!r}. "
                "Go on with the same model and optimizer, or name another offload_dir"
            )


def open_state(
    folder: Path,
    engine: Engine,
    shards: Mapping[str, int],
    identity: Mapping[str, Any],
    checksum: Checksum,
    *,
    resume: bool,
    overwrite: bool = False,
) -> StateFile:
    """The state in `folder`: the last commit's when a run goes on, else a new one with all its room taken.

    The folder is locked for as long as the file is open.

    Raises:
        UsageError: another process uses the folder, or it holds a state and neither resume nor overwrite was asked for.
        StorageError: the folder cannot be written to, or has no room.
        CheckpointError: what is there is damaged, or of another run.
    """
    path = folder / DATA
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StorageError(
            f"the training state cannot be kept here: {error.strerror}", path=str(path), errno=error.errno
        ) from error
    try:
        lock(fd, path, f"another process or trainer works on the state in {folder}; name another offload_dir")
        commit = read_commit(folder) if not overwrite else None
        if commit is not None and not resume:
            raise UsageError(
                f"{folder} holds the training state of step {commit.step}. Go on from it with resume, replace it with "
                "overwrite, or name another offload_dir"
            )
        if commit is None:
            remove_durably(folder / MANIFEST)
            _take_room(fd, folder, room(shards))
        else:
            check_identity(commit.identity, identity)
            if os.fstat(fd).st_size != room(shards):
                raise CheckpointError(
                    f"{path} has {os.fstat(fd).st_size:,} bytes, not the {room(shards):,} it was made with"
                )
    except BaseException:
        os.close(fd)
        raise
    file = engine.open(path, writable=True, fd=fd)  # the descriptor is its own from here on
    return StateFile(folder, file, engine, shards, identity, checksum, commit)


def _take_room(fd: int, folder: Path, nbytes: int) -> None:
    try:
        os.ftruncate(fd, 0)
        if nbytes:
            os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.ftruncate(fd, 0)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StorageError(
                f"offload_dir has no room for {format_bytes(nbytes)} of training state; free some space or name "
                "another folder",
                path=str(folder), errno=error.errno,
            ) from error  # fmt: skip
        raise StorageError(f"{error.strerror}", path=str(folder), errno=error.errno) from error
