"""Predicted beside real peak memory: closed forms, and small runs in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from models import MODELS

from offload.planner.workspace import (
    HOLES,
    LOADED,
    MOST_HOLES,
    PASSAGE,
    PASSING,
    RUNNING,
    crossing_nbytes,
    expected_peak,
)
from offload.specs import ModelSpec, TensorSpec, UnitSpec, Workload
from offload.units import GIB, MIB

RUN = """
import json, sys
from pathlib import Path
from offload.bench.trial import expect, observe
from offload.api import load
from offload.hardware import peak_rss_bytes
from offload.kernels.chosen import compile_seconds

folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
handle = load(folder, context=1024 + 4, prompt_tokens=1024, **options)
with handle:
    handle.measure_disk()
    prediction, profile = expect(handle, folder, handle.work, remembers=False)
    observe(handle, prediction, profile, handle.work, is_first=True)
    print(json.dumps([prediction.peak_rss_bytes, peak_rss_bytes(), compile_seconds()]))
"""


def test_the_peak_is_the_fullest_of_three_moments() -> None:
    assert expected_peak(100, 10, 5, 1000) == 115 + RUNNING + 1000 + int(HOLES * 1000)
    assert expected_peak(100, 10, 5, 0, passing=GIB) == 110 + LOADED + PASSAGE, "rings are not touched yet"
    assert expected_peak(100, 10, 5, 0, passing=GIB, on_disk=GIB) == 115 + LOADED + PASSAGE
    assert expected_peak(0, 0, 0, GIB) == RUNNING + GIB + MOST_HOLES
    assert LOADED < RUNNING < PASSAGE == 64 * MIB


def test_rows_cross_only_where_there_are_many_of_activations() -> None:
    def parts(nbytes: int) -> tuple[TensorSpec, ...]:
        return (TensorSpec(name="a", nbytes=nbytes, read_nbytes=nbytes, slot_nbytes=nbytes),)

    spec = ModelSpec(units=(UnitSpec(name="block", tensors=()), UnitSpec(name="head", tensors=(), is_head=True)))
    both = {"block": parts(3 * MIB), "head": parts(GIB)}
    few, many = (Workload(batch=2, prompt_tokens=n, total_tokens=n + 1) for n in (32, 33))
    assert crossing_nbytes(spec, both, few) == 0
    assert crossing_nbytes(spec, both, many) == 6 * MIB, "a head sees the last tokens alone"
    assert crossing_nbytes(spec, both, replace(few, batch=65)) == 2 * PASSING
    assert expected_peak(0, 0, 0, 0, crossing=MIB) == RUNNING + MIB


@pytest.mark.parametrize(
    "options",
    [{"cpu_memory": "8GiB"}, {"cpu_memory": "4GiB", "gpu_memory": "64MiB", "device": "emulated", "cpu_share": 1}],
    ids=["in memory", "beside an emulated device"],
)
def test_a_run_takes_what_was_predicted_and_little_less(tmp_path: Path, options: dict[str, object]) -> None:
    """Interpreter and libraries are nearly all of it, so what a run adds to them shows at once.

    A run that compiles kernels for the first time takes more, so that the one behind it counts.
    """
    folder = MODELS["llama"].save(tmp_path / "model")
    command = [sys.executable, "-c", RUN, str(folder), json.dumps(options)]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True)
        assert not done.returncode, done.stderr
        predicted, measured, compiled = json.loads(done.stdout.splitlines()[-1])
        if not compiled:
            break
    assert 1 <= predicted / measured <= 1.05
