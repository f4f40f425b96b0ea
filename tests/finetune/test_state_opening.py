"""Opening the state of a run, of shards or of a log: a disk that fails, or is full, is met there and named."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest
from tiny_state import IDENTITY, opened

from offload.errors import StorageError
from offload.io.engine import Engine
from offload.tiers.commit import MANIFEST
from offload.tiers.logfile import LogFile


def test_a_full_disk_is_met_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with Engine() as engine, pytest.raises(StorageError, match=r"no room for .*48.0 KiB"):
        opened(tmp_path, engine)


CALLS = {"shards": ("unlink", "fsync", "ftruncate", "posix_fallocate"), "log": ("unlink", "fsync")}


@pytest.mark.parametrize(("kind", "call"), [(kind, call) for kind, calls in CALLS.items() for call in calls])
def test_a_disk_that_fails_at_the_start_is_named(
    kind: str, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    (tmp_path / MANIFEST).touch()
    monkeypatch.setattr(os, call, failing)
    given: dict[str, Any] = {"resume": True, "overwrite": True}
    with Engine() as engine, pytest.raises(StorageError, match="Input/output error"):
        opened(tmp_path, engine, **given) if kind == "shards" else LogFile(tmp_path, IDENTITY, **given)


@pytest.mark.parametrize("kind", ["shards", "log"])
def test_a_folder_that_cannot_be_locked_is_not_said_to_be_in_use(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", failing)
    with Engine() as engine, pytest.raises(StorageError, match="cannot be locked") as failed:
        opened(tmp_path, engine) if kind == "shards" else LogFile(tmp_path, IDENTITY, resume=True, overwrite=False)
    assert failed.value.errno == errno.ENOLCK


def test_a_file_that_cannot_be_swept_is_named(tmp_path: Path) -> None:
    (tmp_path / "weights-1-0.bin").mkdir()
    with pytest.raises(StorageError, match=r"cannot be removed: .*weights-1-0\.bin"):
        LogFile(tmp_path, IDENTITY, resume=True, overwrite=False)
