"""Models whose weights are not here: headers, or a configuration, tell the planner the same."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from models import MODELS

from offload.checkpoint.numbers import numbers
from offload.checkpoint.outline import sketch
from offload.errors import FormatError
from offload.kernels.formats.weights import parse_weights


def without_weights(source: Path, target: Path) -> Path:
    """A copy whose files end with their headers."""
    target.mkdir()
    for file in source.iterdir():
        if file.suffix == ".safetensors":
            raw = file.read_bytes()
            (target / file.name).write_bytes(raw[: 8 + int.from_bytes(raw[:8], "little")])
        else:
            shutil.copy(file, target)
    return target


@pytest.mark.parametrize("name", ["llama", "llama-tied", "mixtral"])
def test_headers_tell_what_files_tell(name: str, tmp_path: Path) -> None:
    whole = MODELS[name].save(tmp_path / "whole")
    bare = without_weights(whole, tmp_path / "bare")
    assert sketch(bare).spec == sketch(whole).spec
    assert sketch(bare).basis == "headers"


def test_a_configuration_is_enough(tmp_path: Path) -> None:
    whole = MODELS["llama"].save(tmp_path / "whole")
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(whole / "config.json", bare)
    found, expected = sketch(bare), sketch(whole)
    assert found.basis == "config"
    assert found.spec == expected.spec
    packed = sketch(bare, weights=parse_weights("int8")).spec
    assert {t.format for u in packed.units for t in u.tensors if t.outputs and not u.is_head} == {"int8"}
    assert {t.stored_format for u in packed.units for t in u.tensors} == {"float32"}


def test_experts_are_known(tmp_path: Path) -> None:
    spec = sketch(MODELS["mixtral"].save(tmp_path / "m")).spec
    stacks = [t for u in spec.units for t in u.tensors if t.experts]
    assert {(t.experts, t.chosen) for t in stacks} == {(4, 2)}
    assert [u.layers for u in spec.units].count(1) == 5
    assert sum(u.is_head for u in spec.units) == 1


def test_damaged_headers_are_refused_all_the_same(tmp_path: Path) -> None:
    bare = without_weights(MODELS["llama"].save(tmp_path / "whole"), tmp_path / "bare")
    file = sorted(bare.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(FormatError):
        sketch(bare)


def test_what_a_run_would_miss_is_noted(tmp_path: Path) -> None:
    whole = MODELS["llama"].save(tmp_path / "whole")
    assert numbers(whole).notes == ()
    bare = without_weights(whole, tmp_path / "bare")
    assert numbers(bare).notes == ("only headers are here, no weights: enough for a plan, not for a run",)
    first, *others = files = sorted(whole.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-7])
    (said,) = numbers(whole).notes
    assert said.startswith(f"1 of {len(files)} files is cut short ({first.name}: ")
    assert numbers(whole).basis == "headers"
    first.unlink()
    (said,) = numbers(whole).notes
    assert said.startswith(f"1 of {len(files)} shards are not here ({first.name})")
    assert numbers(whole).basis == sketch(whole).basis == "config"
    assert others
