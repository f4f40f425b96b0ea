"""The state file: what was committed is found, whatever fails, whenever; and nothing damaged is taken for it."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from offload.errors import CheckpointError, OffloadError, StorageError, UsageError
from offload.io.backends.base import Block
from offload.io.backends.fake import FakeBackend, FakeDisk
from offload.io.buffers import Buffer
from offload.io.engine import Engine
from offload.kernels.reference import checksum
from offload.tiers.commit import MANIFEST, read_commit
from offload.tiers.host import as_tensor
from offload.tiers.logfile import LogFile
from offload.tiers.statefile import DATA, StateFile, open_state, room

SHARDS = {"a": 8192, "b": 4096, "c": 12288}
IDENTITY = {"model": "tiny", "optimizer": "adamw"}
STEPS = 5


def contents(name: str, generation: int) -> torch.Tensor:
    """What a shard holds after a step."""
    generator = torch.Generator().manual_seed(generation * 100 + ord(name))
    return torch.randint(0, 256, (SHARDS[name],), dtype=torch.uint8, generator=generator)


def write_step(state: StateFile, generation: int) -> None:
    """Reads every shard, checks it, and writes the next generation."""
    for name, nbytes in SHARDS.items():
        buffer = Buffer(nbytes)
        if generation:
            state.read(name, buffer.view).result()
            state.verify(name, buffer.view)
            assert torch.equal(as_tensor(buffer.view), contents(name, generation - 1))
        as_tensor(buffer.view).copy_(contents(name, generation))
        state.write(name, buffer.view, generation).result()


def check(state: StateFile) -> int:
    """Every shard is what the committed step wrote; returns the step."""
    for name, nbytes in SHARDS.items():
        buffer = Buffer(nbytes)
        state.read(name, buffer.view).result()
        state.verify(name, buffer.view)
        assert torch.equal(as_tensor(buffer.view), contents(name, state.step)), (name, state.step)
    return state.step


def opened(folder: Path, engine: Engine, **options: Any) -> StateFile:
    return open_state(folder, engine, SHARDS, IDENTITY, checksum, **{"resume": True, **options})


def test_a_commit_is_found_and_nothing_later(tmp_path: Path) -> None:
    for committed in range(STEPS):
        with Engine() as engine:
            state = opened(tmp_path, engine)
            if committed:
                assert check(state) == committed - 1
                assert state.extra == {"position": committed - 1}
            write_step(state, committed)
            state.commit(committed, {"position": committed})
            write_step(state, committed + 1)  # lost: never committed
            write_step(state, committed + 2)  # over the same slots
            state.close()
    assert (tmp_path / DATA).stat().st_size == room(SHARDS)
    assert (tmp_path / DATA).stat().st_mode & 0o777 == 0o600


def test_what_is_there_is_not_lost_by_mistake(tmp_path: Path) -> None:
    with Engine() as engine:
        state = opened(tmp_path, engine)
        write_step(state, 0)
        state.commit(0, {})
        with pytest.raises(UsageError, match="another process"):
            opened(tmp_path, engine)
        state.close()
        with pytest.raises(UsageError, match=r"step 0.*resume"):
            opened(tmp_path, engine, resume=False)
        with pytest.raises(CheckpointError, match=r"optimizer is 'adamw'.*'sgd'"):
            open_state(tmp_path, engine, SHARDS, IDENTITY | {"optimizer": "sgd"}, checksum, resume=True)
        opened(tmp_path, engine, resume=False, overwrite=True).close()
        assert read_commit(tmp_path) is None


def test_a_full_disk_is_met_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with Engine() as engine, pytest.raises(StorageError, match=r"no room for .*48.0 KiB"):
        opened(tmp_path, engine)


@pytest.mark.parametrize("call", ["unlink", "fsync", "ftruncate", "posix_fallocate"])
@pytest.mark.parametrize("kind", ["shards", "log"])
def test_a_disk_that_fails_at_the_start_is_named(
    kind: str, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    (tmp_path / MANIFEST).touch()
    monkeypatch.setattr(os, call, failing)
    if kind == "shards":
        with Engine() as engine, pytest.raises(StorageError, match="Input/output error"):
            opened(tmp_path, engine, overwrite=True)
    elif call in ("unlink", "fsync"):
        with pytest.raises(StorageError, match="Input/output error"):
            LogFile(tmp_path, IDENTITY, resume=True, overwrite=True)


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


def test_every_damaged_byte_is_found_and_named(tmp_path: Path) -> None:
    with Engine(direct=False) as engine:
        state = opened(tmp_path, engine)
        write_step(state, 0)
        state.commit(0, {"note": "x"})
        state.close()
    data = tmp_path / DATA
    whole = data.read_bytes()
    starts = {"a": 0, "b": 8192, "c": 12288}
    with Engine(direct=False) as engine:
        state = opened(tmp_path, engine)
        buffer = Buffer(max(SHARDS.values()))
        for name, start in starts.items():
            for at in range(0, SHARDS[name], 397):
                broken = bytearray(whole)
                broken[start + at] ^= 1 + at % 255
                data.write_bytes(broken)
                state.read(name, buffer.view).result()
                with pytest.raises(CheckpointError, match=f"state of {name} is damaged"):
                    state.verify(name, buffer.view)
        state.close()
    manifest = tmp_path / MANIFEST
    text = manifest.read_bytes()
    for at in range(len(text)):
        broken = bytearray(text)
        broken[at] ^= 1
        manifest.write_bytes(broken)
        with pytest.raises(CheckpointError, match="damaged"):
            read_commit(tmp_path)
    for length in range(len(text)):
        manifest.write_bytes(text[:length])
        with pytest.raises(CheckpointError, match="damaged"):
            read_commit(tmp_path)
    digest, _, body = text.partition(b"\n")
    assert len(digest) == 64
    assert json.loads(body)["extra"] == {"note": "x"}


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
