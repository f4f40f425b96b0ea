"""`offload.probe` of a tiny model, by the code that measures real ones: is the profile whole, kept, and found again?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import MODELS
from rich.console import Console
from typer.testing import CliRunner

import offload
from offload import hardware
from offload.cli import app
from offload.commands.probe import table
from offload.errors import UsageError
from offload.probes import probe as probe_module
from offload.probes.effort import TINY
from offload.probes.probe import _subject
from offload.probes.survey import Survey
from offload.profile import Profile, dump, load_profile, own_profile, parse, save_profile
from offload.profile import cache as profile_cache


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MODELS["llama"].save(tmp_path_factory.mktemp("model"), torch.bfloat16)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OFFLOAD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield hardware.cache_dir()


@pytest.fixture(scope="module")
def measured(folder: Path, scratch: Path, cache: Path) -> Profile:
    return offload.probe(folder, effort="tiny", offload_dir=scratch)


def test_the_profile_is_whole(measured: Profile, scratch: Path) -> None:
    assert measured.source == "measured"
    assert {"read", "write"} <= set(measured.lanes)
    assert {"read_submit", "handoff", "unit", "step", "apart", "read_alone", "assemble", "waking"} <= set(
        measured.costs
    )
    found = {(t.op, t.implementation, t.format) for t in measured.ops}
    assert {
        ("linear", "cpu", "bfloat16"), ("linear", "torch", "bfloat16"), ("linear_int8", "cpu", "int8"),
        ("linear_int4", "cpu", "int4-32"), ("linear_lossless", "cpu", "lossless"),
        ("unpack_lossless", "cpu", "lossless"), ("dequantize_int8", "cpu", "int8"),
        ("dequantize_int4", "cpu", "int4-32"), ("block", "torch", "bfloat16"), ("attention", "torch", "bfloat16"),
        ("decode_attention", "torch", "bfloat16"), ("decode_attention", "cpu", "bfloat16"),
        ("adamw_step", "cpu", "bfloat16"), ("adamw_step_8bit", "cpu", "bfloat16"), ("rms_norm", "cpu", "bfloat16"),
        ("rotary", "torch", "bfloat16"),
    } <= found  # fmt: skip
    shapes = {t.shape for t in measured.ops if t.op == "linear"}
    assert shapes == {(64, 64), (32, 64), (96, 64), (64, 96), (320, 64)}
    for lane in ("read", "write"):
        assert set(measured.interference[lane]) >= {"cpu", "cpu.gemm", "cpu.adamw"}
        assert set(measured.interference["cpu"]) >= {lane}
    assert set(measured.interference["cpu.copy"]) == {"read", "cpu", "cpu.gemm"}, "what an emulated link runs beside"
    assert measured.processors["cpu"].flops.keys() == {"bfloat16", "float32"}
    assert measured.tiers[-1].name == "disk"
    assert not list(scratch.iterdir())


def test_it_survives_its_file(measured: Profile) -> None:
    assert parse(dump(measured)) == measured


def test_it_is_found_again(measured: Profile, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(probe_module, "Survey", fails)
    assert offload.probe(folder) == measured
    assert load_profile(folder) == measured
    assert load_profile() == measured, "another model's profile is better than none"
    assert own_profile(None) is None
    with pytest.raises(AssertionError, match="measured again"):
        offload.probe(folder, effort="quick")


def test_another_machine_has_another_profile(measured: Profile, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_cache, "fingerprint", lambda: "another")
    assert load_profile(folder) is None


def test_other_code_is_measured_anew(measured: Profile, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_cache, "versions", lambda: hardware.versions() | {"torch": "0"})
    assert load_profile(folder) is None


def test_a_damaged_file_is_no_profile(
    measured: Profile, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OFFLOAD_CACHE", str(tmp_path))
    file = save_profile(measured, folder)
    assert load_profile(folder) == measured
    file.write_text("schema = 1\nname =")
    assert load_profile(folder) is None


def test_a_model_and_a_machine_are_kept_apart(
    measured: Profile, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OFFLOAD_CACHE", str(tmp_path))
    machine = replace(measured, name="machine")
    save_profile(measured, folder)
    save_profile(machine)
    assert load_profile(folder) == measured
    assert load_profile() == machine
    assert len(list(tmp_path.rglob("*"))) == 3, "a folder and two files"


def test_the_table_has_a_row_for_everything(measured: Profile) -> None:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table(measured))
    text = console.export_text()
    for word in ("memory read", "large products", "sustained", "linear_int4", "adamw_step", "handoff", "read keeps"):
        assert word in text


def test_the_command(measured: Profile, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "here.toml"
    result = CliRunner().invoke(app, ["probe", str(folder), "--json", "-o", str(out)])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["fingerprint"] == measured.fingerprint
    assert parse(out.read_text()) == measured


def test_files_shorter_than_a_block_are_not_what_is_read(folder: Path, tmp_path: Path) -> None:
    for nbytes, is_long in ((64 << 10, True), (64 << 20, False)):
        effort = replace(TINY, blocks=((nbytes, 1),))
        with Survey(_subject(folder), effort, tmp_path)._files() as files:
            assert (files.read[0].parent == folder) == is_long
            assert (files.read == files.write) != is_long


def test_wrong_options() -> None:
    result = CliRunner().invoke(app, ["probe", "--quick", "--full"])
    assert isinstance(result.exception, UsageError)
    with pytest.raises(UsageError, match="quick or full"):
        offload.probe(effort="slow")
