"""The hardware profile: curves, strict TOML, presets. Numbers only."""

from __future__ import annotations

import math
import re
import tomllib
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.errors import UsageError
from offload.kernels import OPS
from offload.profile import Curve, OpTable, Profile, dump, load, parse, preset, presets
from offload.units import MIB

ROWS = [(1.0, 1e-3, 0.02), (8.0, 2e-3, 0.01), (64.0, 16e-3, 0.05)]


def measured() -> Profile:
    """A profile that uses every part of the format."""
    tables = tuple(
        OpTable(
            op="linear",
            implementation="cpu",
            processor="cpu",
            format="bfloat16",
            shape=shape,
            over="rows",
            curve=Curve.of((x, y * scale, s) for x, y, s in ROWS),
            threads=2,
        )
        for shape, scale in (((1024, 1024), 1.0), ((4096, 4096), 16.0))
    )
    base = preset("a100-gen4-nvme4x4")
    return replace(
        base,
        source="measured",
        ops=tables,
        calibration={"linear": 1.02},
        versions={"offload": "0.1", "a b": 'quo"te'},
        notes=("one\ttab", "two"),
        drift=0.01,
        noise=0.005,
    )


def test_a_profile_survives_the_file() -> None:
    assert parse(dump(measured())) == measured()


@pytest.mark.parametrize("name", presets())
def test_presets(name: str) -> None:
    found = preset(name)
    assert found.name == name
    assert found.source == "estimate"
    assert parse(dump(found)) == found
    assert [t.name for t in found.tiers][-2:] == ["host", "disk"]
    assert all(found.lane(t.load).bytes_per_s > 0 for t in found.tiers if t.load)


def test_there_are_presets_from_small_to_large() -> None:
    assert len(presets()) >= 8
    with pytest.raises(UsageError, match=r"did you mean 'rtx4090-gen4-nvme4'"):
        preset("rtx4090-gen4-nvm")


@given(st.lists(st.tuples(st.floats(1, 1e12), st.floats(1e-9, 1e3)), min_size=1, max_size=8, unique_by=lambda p: p[0]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_curve_goes_through_its_anchors(points: list[tuple[float, float]]) -> None:
    curve = Curve.of(points)
    for x, y in points:
        assert math.isclose(curve.seconds(x), y, rel_tol=1e-9)


def test_a_curve_between_and_beyond() -> None:
    curve = Curve.of([(10, 1.0, 0.1), (1000, 100.0, 0.0)])
    assert math.isclose(curve.seconds(100), 10.0)  # the straight line in log-log
    assert curve.seconds(1) == 1.0  # never less than the smallest
    assert curve.seconds(2000) == 200.0  # on at the last rate
    assert curve.spread(5) == 0.1
    assert not curve.covers(2000)


def test_a_lane_is_no_faster_than_it_lasts() -> None:
    lane = preset("rtx4090-gen4-nvme4").lane("write")
    assert math.isclose(lane.seconds(2e9), 1.0)
    assert lane.best > lane.bytes_per_s
    read = preset("rtx4090-gen4-nvme4").lane("read")
    assert read.seconds(64 * MIB) < read.seconds(128 * MIB) < 2.01 * read.seconds(64 * MIB)
    assert read.seconds(0) == 0


def test_ops_come_from_their_table_then_scaled_then_not_at_all() -> None:
    profile = measured()

    def ask(shape: tuple[int, ...], amount: float, op: str = "linear"):  # type: ignore[no-untyped-def]
        return profile.op_seconds(op, processor="cpu", format="bfloat16", shape=shape, amount=amount)

    exact = ask((1024, 1024), 8)
    assert (exact.origin, exact.seconds) == ("table", pytest.approx(2e-3))
    between = ask((2048, 2048), 8)
    assert (between.origin, between.seconds) == ("scaled", pytest.approx(8e-3))
    larger = ask((8192, 4096), 1)
    assert (larger.origin, larger.seconds) == ("scaled", pytest.approx(32e-3))
    assert ask((1024, 1024), 8, op="linear_int8") is None
    assert {table.op for table in profile.ops} <= set(OPS)
    guess = profile.roofline(processor="device", flops=1.0, nbytes=2e12, dtype="bfloat16")
    assert guess.origin == "roofline"
    assert 1.0 < guess.seconds < 2.0


GOOD = dump(measured())


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("drift = 0.01", "drfit = 0.01", "drfit is not known; did you mean 'drift'"),
        ("drift = 0.01", "drift = -1", "drift=-1 must lie from 0"),
        ("drift = 0.01", "drift = nan", "must be a number"),
        ("drift = 0.01", "drift = true", "must be a number"),
        ('source = "measured"', 'source = "guess"', "it is one of measured, estimate"),
        ("schema = 1", "schema = 2", "measure again"),
        ("schema = 1", "", "schema is missing"),
        ('load = "h2d"', 'load = "h2x"', "uses lane 'h2x'"),
        ('processor = "device"', 'processor = "gpu"', "computes on 'gpu'"),
        ('load = "read"\n', "", "needs a lane that loads"),
        ("efficiency = 0.8", "efficency = 0.8", "did you mean 'efficiency'"),
        ("    [1, 0.001, 0.02],", "    [1, 0.001, 0.02, 4],", "which is not"),
        ("    [1, 0.001, 0.02],", "    [1, 0, 0.02],", "seconds above 0"),
        ("    [1, 0.001, 0.02],", "    [8, 0.001, 0.02],", "must ascend"),
        ("h2d = 0.95", "h3d = 0.95", "interference names 'h3d'"),
        ("h2d = 0.95", "h2d = 95", "must lie from 0.01 to 1.5"),
        ("shape = [1024, 1024]", "shape = [1024, -1]", "whole numbers above 0"),
        ("drift = 0.01", "drift = 0.01\ndrift = 0.01", "not TOML"),
    ],
)
def test_what_is_wrong_is_said(old: str, new: str, says: str) -> None:
    assert old in GOOD
    with pytest.raises(UsageError, match=re.escape(says)):
        parse(GOOD.replace(old, new, 1))


def test_nothing_may_be_left_out_of_place() -> None:
    """Every key of a good file under another name is refused."""
    for k, line in enumerate(lines := GOOD.splitlines()):
        key, is_key, _ = line.partition(" = ")
        if not is_key or line.startswith(("#", "[")) or '"' in key:
            continue
        section = next((s for s in reversed(lines[:k]) if s.startswith("[")), "")
        if any(word in section for word in ("costs", "shared", "versions", "calibration")):
            continue  # any name may stand there
        spoilt = "\n".join([*lines[:k], line.replace(key, key + "x", 1), *lines[k + 1 :]])
        tomllib.loads(spoilt)
        with pytest.raises(UsageError):
            parse(spoilt)


def test_files_that_cannot_be_read(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UsageError, match="cannot be read"):
        load(tmp_path / "none.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="cannot be read"):
        load(tmp_path / "bytes.toml")
    (tmp_path / "text.toml").write_text("name = 3")
    with pytest.raises(UsageError, match=r"text\.toml"):
        load(tmp_path / "text.toml")
