"""offload pack: whole or not at all; what it writes is checked when it is read."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from forks import Forks
from models import MODELS

import offload
from offload.checkpoint.finding import MANIFEST
from offload.cli import main
from offload.commands.early import check_pack
from offload.io.safetensors import read_checkpoint
from offload.kernels.formats.form import ALIGNMENT
from offload.tiers.sink import Sink


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MODELS["llama-tied"].save(tmp_path_factory.mktemp("llama"), torch.bfloat16)


def test_command(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        main(["pack", str(checkpoint), str(tmp_path / "out"), "--weights", "int8", "--json"])
    assert status.value.code == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["written_bytes"] < facts["read_bytes"]
    assert 0 < max(facts["errors"].values()) < 0.02
    with pytest.raises(SystemExit):
        main(["run", str(tmp_path / "out"), "--prompt-ids", "3,4", "--max-new-tokens", "2", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["weights"] == "int8"
    assert "linear_int8" in found["kernels"] or "dequantize_int8" in found["kernels"]


def test_the_file_is_safetensors_and_matrices_are_aligned(checkpoint: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    offload.pack(checkpoint, tmp_path / "out")
    described = json.loads((tmp_path / "out" / MANIFEST).read_bytes())["tensors"]
    entries = read_checkpoint(tmp_path / "out").entries
    assert all(entries[name].offset % ALIGNMENT == 0 for name in described)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(entries)


def test_other_readers_refuse_it(checkpoint: Path, tmp_path: Path) -> None:
    offload.pack(checkpoint, tmp_path / "out")
    with pytest.raises((ValueError, RuntimeError)):  # it knows no such method, and matrices have no such shapes
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_full_folder_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(offload.UsageError, match="exists already"):
        offload.pack(checkpoint, tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_packing_twice_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    offload.pack(checkpoint, tmp_path / "out")
    with pytest.raises(offload.UsageError, match="packed already"):
        offload.pack(tmp_path / "out", tmp_path / "again")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "ctrl-c"])
def test_a_failure_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(self: Sink, data: Any) -> None:
        raise error

    monkeypatch.setattr(Sink, "append", fail)
    with pytest.raises(type(error)):
        offload.pack(checkpoint, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_too_small_a_disk_is_refused_first(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 1 << 40, 1000))  # type: ignore[attr-defined]
    with pytest.raises(offload.StorageError, match="needs about"):
        offload.pack(checkpoint, tmp_path / "out")
    with pytest.raises(offload.StorageError, match="needs about"):
        check_pack(str(checkpoint), str(tmp_path / "out" / "below"), "int4", "threads")
    assert not (tmp_path / "out").exists()


def test_a_kill_leaves_no_weights(checkpoint: Path, tmp_path: Path, forks: Forks) -> None:
    code = (
        "import os, signal, sys, offload\n"
        "from offload.tiers.sink import Sink\n"
        "Sink.finish = lambda self, head: os.kill(os.getpid(), signal.SIGKILL)\n"
        "offload.pack(sys.argv[1], sys.argv[2])\n"
    )
    done = forks.run(code, checkpoint, tmp_path / "out")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file()) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2"),
        ({"tensors": {"no.such": {"kind": "int8", "outputs": 1, "inputs": 1, "dtype": "bfloat16"}}}, "no.such"),
        ({"extra": 1}, "no manifest"),
        ("kind", "makes no sense"),
        ("inputs", "pack the model again"),
        ("patches", "pack the model again"),
    ],
)
def test_a_manifest_that_lies_is_refused(checkpoint: Path, tmp_path: Path, change: Any, message: str) -> None:
    offload.pack(checkpoint, tmp_path / "out")
    path = tmp_path / "out" / MANIFEST
    facts = json.loads(path.read_bytes())
    if isinstance(change, dict):
        facts |= change
    else:
        first = next(iter(facts["tensors"].values()))
        first[change] = "zip" if change == "kind" else first.get(change, 0) + 1000
    path.write_text(json.dumps(facts))
    with pytest.raises(offload.CheckpointError, match=message):
        offload.load(tmp_path / "out")


def test_another_format_or_dtype_than_packed_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    offload.pack(checkpoint, tmp_path / "out")
    for options in ({"weights": "int8"}, {"dtype": "float32"}):
        with pytest.raises(offload.UsageError, match="packed"):
            offload.load(tmp_path / "out", **options)  # type: ignore[arg-type]
