"""The state of a run whose weights follow from a base and one number a step: the log of those numbers, and the bases.

    state.json           which files are bases, and the log; replaced as a whole by a commit
    weights-120-0.bin    weights with 120 updates in them: those that were written back; all others are the checkpoint's

A file is written before a commit names it and removed after one that does not; so a kill at any instant leaves the last
commit with all its files.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from offload.errors import StorageError, UsageError
from offload.tiers.commit import MANIFEST, Commit, read_commit, write_commit
from offload.tiers.durable import remove_durably, sync_folder
from offload.tiers.images import Base
from offload.tiers.locking import lock
from offload.tiers.statefile import check_identity

BASES = "weights-*.bin"


class LogFile:
    """The log, and the manifest that commits it. Locks its folder until it is closed.

    Attributes:
        folder: of the state.
        log: a number for each step, in order.
        step, extra, bases: of the last commit.
        facts: what every later run needs and cannot find out: plain JSON values, set before the first commit.

    Raises:
        UsageError, CheckpointError, StorageError: as `open_state`.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
        self.folder, self._identity = folder, dict(identity)
        self.log: list[float] = []
        self.step, self.extra = 0, dict[str, Any]()
        self.bases: tuple[Base, ...] = ()
        self.facts: dict[str, Any] = {}
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(folder / "state.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StorageError(
                f"the training state cannot be kept here: {error.strerror}", path=str(folder), errno=error.errno
            ) from error
        try:
            lock(
                self._lock,
                folder,
                f"another process or trainer works on the state in {folder}; name another offload_dir",
            )
            commit = None if overwrite else read_commit(folder)
            if commit is not None and not resume:
                raise UsageError(
                    f"{folder} holds the training state of step {commit.step}. Go on from it with resume, replace it "
                    "with overwrite, or name another offload_dir"
                )
            if commit is not None:
                check_identity(commit.identity, self._identity)
                self.step, self.extra = commit.step, dict(commit.extra["extra"])
                self.facts = dict(commit.extra.get("facts", {}))
                self.log = [float.fromhex(by) for by in commit.extra["log"]]
                self.bases = tuple(map(Base.from_dict, commit.extra.get("bases", ())))
            else:
                remove_durably(folder / MANIFEST)
            self.sweep(())
        except BaseException:
            os.close(self._lock)
            raise

    def commit(self, extra: Mapping[str, Any], bases: Sequence[Base] = ()) -> None:
        """Makes the log as it is now the one that a later run finds. Raises StorageError; the last commit holds.

        Args:
            bases: files that are durable. Those of the last commit that are not among them are removed.
        """
        told = {
            "log": [by.hex() for by in self.log],
            "extra": dict(extra),
            "bases": [b.as_dict() for b in bases],
            "facts": self.facts,
        }
        if bases:
            try:
                sync_folder(self.folder)  # their names, before a manifest that has them
            except OSError as error:
                raise StorageError(
                    f"cannot be written: {error.strerror}", path=str(self.folder), errno=error.errno
                ) from error
        write_commit(self.folder, Commit(step=len(self.log), shards={}, identity=self._identity, extra=told))
        self.step, self.extra, self.bases = len(self.log), dict(extra), tuple(bases)
        self.sweep(())

    def taken_nbytes(self) -> int:
        """Of all files of weights."""
        return sum(path.stat().st_size for path in self.folder.glob(BASES))

    def sweep(self, used: Sequence[str]) -> None:
        """Removes files of weights that neither the last commit has nor `used` names. Raises StorageError."""
        known = {base.file for base in self.bases} | set(used)
        for path in self.folder.glob(BASES):
            if path.name not in known:
                try:
                    path.unlink(missing_ok=True)
                except OSError as error:
                    raise StorageError(
                        f"cannot be removed: {error.strerror}", path=str(path), errno=error.errno
                    ) from error

    def close(self) -> None:
        """Unlocks the folder."""
        os.close(self._lock)
