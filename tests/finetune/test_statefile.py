"""The state file: what was committed is found, and nothing damaged is taken for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_state import IDENTITY, SHARDS, STEPS, check, opened, write_step

from offload.errors import CheckpointError, UsageError
from offload.io.buffers import Buffer
from offload.io.engine import Engine
from offload.kernels.reference import checksum
from offload.tiers.commit import MANIFEST, read_commit
from offload.tiers.statefile import DATA, open_state, room


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
