"""The state file, whatever fails, whenever: a disk that stops or forgets spoils no commit."""

from __future__ import annotations

import errno
import itertools
import os
import random
from pathlib import Path
from typing import Any

import pytest
from tiny_state import IDENTITY, SHARDS, STEPS, check, write_step

from offload.errors import OffloadError, StorageError
from offload.io.backends.base import Block
from offload.io.backends.fake import FakeBackend, FakeDisk
from offload.io.buffers import Buffer
from offload.io.engine import Engine
from offload.kernels.reference import checksum
from offload.tiers.commit import read_commit
from offload.tiers.statefile import DATA, StateFile, room


class PowerLoss(FakeDisk):
    """A disk that forgets: of every sector that was written since the last sync, a crash keeps the old or the new."""

    def __init__(self, path: str, contents: bytes) -> None:
        super().__init__()
        self.path = self.put(path, contents)
        self.durable = bytearray(contents)

    def sync(self, fd: int) -> None:
        super().sync(fd)
        self.durable = bytearray(self.get(self.path))

    def crash(self, rng: random.Random) -> bytes:
        now = self.get(self.path)
        kept = bytearray(self.durable)
        for at in range(0, len(now), 512):
            if rng.random() < 0.5:
                kept[at : at + 512] = now[at : at + 512]
        return bytes(kept)


def run(folder: Path, disk: FakeDisk, path: str, engine: Engine) -> None:
    """Steps, with a commit after every second one."""
    commit = read_commit(folder)
    state = StateFile(folder, engine.open(path, writable=True), engine, SHARDS, IDENTITY, checksum, commit)
    try:
        first = 0 if commit is None else check(state) + 1
        for generation in range(first, STEPS):
            write_step(state, generation)
            if generation % 2 == 0:
                state.commit(generation, {"position": generation})
    finally:
        state.close()


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_power_fails_at_every_operation(number: int, tmp_path: Path) -> None:
    """The disk stops at its k-th operation, sectors are lost, and the run goes on from the last commit: for every k."""
    rng = random.Random(number)
    for k in itertools.count(1):
        folder = tmp_path / str(k)
        folder.mkdir()
        image, path, crashed = bytes(room(SHARDS)), str(folder / DATA), False
        for is_first in (True, False):
            disk = PowerLoss(path, image)
            engine = Engine(FakeBackend(disk=disk), block_nbytes=4096)
            if is_first:
                disk.fail(number, at=k, is_lasting=True)
            try:
                run(folder, disk, path, engine)
            except StorageError:
                if not is_first:
                    raise
                crashed = True
            engine.close()
            image = disk.crash(rng)
        found = read_commit(folder)
        assert found is not None
        assert found.step == STEPS - 1
        disk = PowerLoss(path, image)
        with Engine(FakeBackend(disk=disk)) as engine:
            state = StateFile(folder, engine.open(path, writable=True), engine, SHARDS, IDENTITY, checksum, found)
            assert check(state) == STEPS - 1
            state.close()
        if not crashed:
            assert k > 50
            return


@pytest.mark.parametrize("call", ["open", "write", "fsync", "rename", "close"])
def test_the_manifest_fails_at_every_call(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failed commit, a step that is found is whole, and the open file takes nothing more."""
    true = getattr(os, call)
    for k in itertools.count(1):
        folder = tmp_path / f"{call}{k}"
        folder.mkdir()
        path, left = str(folder / DATA), k
        disk = PowerLoss(path, bytes(room(SHARDS)))
        engine = Engine(FakeBackend(disk=disk))

        def failing(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                if call == "close":
                    true(*args, **kwargs)
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return true(*args, **kwargs)

        state = StateFile(folder, engine.open(path, writable=True), engine, SHARDS, IDENTITY, checksum)
        write_step(state, 0)
        state.commit(0, {})
        write_step(state, 1)
        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            failed = False
            try:
                state.commit(1, {})
            except OffloadError:
                failed = True
        if failed:
            with pytest.raises(StorageError, match="last commit is step 0"):
                write_step(state, 2)
        state.close()
        found = read_commit(folder)
        assert found is not None
        assert found.step in ((0, 1) if failed else (1,))
        again = StateFile(folder, engine.open(path, writable=True), engine, SHARDS, IDENTITY, checksum, found)
        check(again)
        again.close()
        engine.close()
        if not failed:
            break
    assert k > 1


def test_data_is_durable_before_the_manifest_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / DATA)
    disk = PowerLoss(path, bytes(room(SHARDS)))
    rename = os.rename
    with Engine(FakeBackend(disk=disk)) as engine:
        state = StateFile(tmp_path, engine.open(path, writable=True), engine, SHARDS, IDENTITY, checksum)
        write_step(state, 0)

        def renamed(*args: Any) -> None:
            assert bytes(disk.durable) == disk.get(path)
            rename(*args)

        monkeypatch.setattr(os, "rename", renamed)
        state.commit(0, {})
        state.close()


def test_a_failed_write_spoils_no_commit(tmp_path: Path) -> None:
    path = str(tmp_path / DATA)
    disk = PowerLoss(path, bytes(room(SHARDS)))
    with Engine(FakeBackend(disk=disk)) as engine:
        state = StateFile(tmp_path, engine.open(path, writable=True), engine, SHARDS, IDENTITY, checksum)
        write_step(state, 0)
        state.commit(0, {})
        disk.fail(errno.EIO, operation="write", at=2)
        with pytest.raises(StorageError):
            write_step(state, 1)
        with pytest.raises(StorageError, match="last commit is step 0"):
            state.write("c", Buffer(SHARDS["c"]).view, 1)
        state.close()
        again = StateFile(
            tmp_path, engine.open(path, writable=True), engine, SHARDS, IDENTITY, checksum, read_commit(tmp_path)
        )
        assert check(again) == 0
        again.close()


def test_blocks_are_only_written_to_slots_that_are_not_committed(tmp_path: Path) -> None:
    """Of every write the disk sees: never the committed half of its shard."""
    path, seen = str(tmp_path / DATA), list[int]()

    class Watched(PowerLoss):
        def transfer(self, block: Block) -> int:
            if block.is_write:
                seen.append(block.offset)
            return super().transfer(block)

    disk = Watched(path, bytes(room(SHARDS)))
    half = room(SHARDS) // 2
    with Engine(FakeBackend(disk=disk)) as engine:
        state = StateFile(tmp_path, engine.open(path, writable=True), engine, SHARDS, IDENTITY, checksum)
        for generation, expected in ((0, 0), (1, 1), (2, 1), (3, 0)):
            write_step(state, generation)
            assert {offset // half for offset in seen} == {expected}
            seen.clear()
            if generation in (0, 2):
                state.commit(generation, {})
        state.close()
