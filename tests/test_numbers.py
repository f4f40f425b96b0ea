"""A checkpoint's numbers: recognised where they can be, remembered where they cannot, and never stale."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from models import MODELS

from offload.checkpoint import numbers as module
from offload.checkpoint.numbers import numbers
from offload.checkpoint.outline import sketch
from offload.errors import CheckpointError, UsageError
from offload.plan.process import process_nbytes, remember_process
from offload.units import MIB


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OFFLOAD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("the model's own modules were asked")

    monkeypatch.setattr(module, "_from_modules", never)


def test_a_known_decoder_asks_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    folder = MODELS["qwen3_moe"].save(tmp_path / "model")
    expected = sketch(folder).spec
    forbid(monkeypatch)
    assert numbers(folder).spec == expected
    assert not cache.exists()


def test_others_are_remembered_until_something_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = MODELS["gpt2"].save(tmp_path / "model")
    found = numbers(folder)
    assert found.spec == sketch(folder).spec
    packed = numbers(folder, weights="int8")
    assert packed.weights == "int8"
    forbid(monkeypatch)
    assert numbers(folder) == found
    assert numbers(folder, weights="int8") == packed
    with pytest.raises(AssertionError):
        numbers(folder, dtype="bfloat16")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_positions": 256}))
    with pytest.raises(AssertionError):
        numbers(folder)


def test_a_damaged_memory_is_none(tmp_path: Path, cache: Path) -> None:
    folder = MODELS["gpt2"].save(tmp_path / "model")
    found = numbers(folder)
    (file,) = (cache / "outlines").iterdir()
    file.write_bytes(b"\xc1")
    assert numbers(folder) == found


@pytest.mark.parametrize(("text", "says"), [("{", "cannot be used"), ("[]", "cannot be used")])
def test_a_broken_configuration_is_named(tmp_path: Path, text: str, says: str) -> None:
    folder = MODELS["llama"].save(tmp_path / "model")
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=says):
        numbers(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="no config"):
        numbers(folder)


def test_bad_options(tmp_path: Path) -> None:
    folder = MODELS["llama"].save(tmp_path / "model")
    with pytest.raises(UsageError, match="is not known"):
        numbers(folder, dtype="float99")
    with pytest.raises(UsageError, match="is not a format"):
        numbers(folder, weights="int5")


def test_the_size_of_a_process_is_learnt_from_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.delitem(sys.modules, "transformers.modeling_utils", raising=False)
    assert process_nbytes(exact=False) > process_nbytes(exact=True) > 100 * MIB
    remember_process(777 * MIB, exact=False)
    assert process_nbytes(exact=False) == 777 * MIB
    assert process_nbytes(exact=True) < 700 * MIB
    remember_process(778 * MIB, exact=False)
    assert process_nbytes(exact=False) == 777 * MIB
