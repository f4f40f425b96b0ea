"""The state of a run whose weights follow from a checkpoint and one number a step: the log of those numbers."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from offload.errors import StorageError, UsageError
from offload.tiers.commit import MANIFEST, Commit, read_commit, write_commit
from offload.tiers.durable import sync_folder
from offload.tiers.statefile import check_identity


class LogFile:
    """The log, and the manifest that commits it. Locks its folder until it is closed.

    Attributes:
        log: a number for each step, in order.
        step, extra: of the last commit.

    Raises:
        UsageError, CheckpointError, StorageError: as `open_state`.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
        self._folder, self._identity = folder, dict(identity)
        self.log: list[float] = []
        self.step, self.extra = 0, dict[str, Any]()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(folder / "state.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StorageError(
                f"the training state cannot be kept here: {error.strerror}", path=str(folder), errno=error.errno
            ) from error
        try:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UsageError(f"another process trains with the state in {folder}; name another one") from error
            commit = None if overwrite else read_commit(folder)
            if commit is not None and not resume:
                raise UsageError(
                    f"{folder} holds the training state of step {commit.step}. Go on from it with resume, replace it "
                    "with overwrite, or name another offload_dir"
                )
            if commit is not None:
                check_identity(commit.identity, self._identity)
                self.step, self.extra = commit.step, dict(commit.extra["extra"])
                self.log = [float.fromhex(by) for by in commit.extra["log"]]
            else:
                (folder / MANIFEST).unlink(missing_ok=True)
                sync_folder(folder)
        except BaseException:
            os.close(self._lock)
            raise

    def commit(self, extra: Mapping[str, Any]) -> None:
        """Makes the log as it is now the one that a later run finds. Raises StorageError; the last commit holds."""
        told = {"log": [by.hex() for by in self.log], "extra": dict(extra)}
        write_commit(self._folder, Commit(step=len(self.log), shards={}, identity=self._identity, extra=told))
        self.step, self.extra = len(self.log), dict(extra)

    def close(self) -> None:
        """Unlocks the folder."""
        os.close(self._lock)
