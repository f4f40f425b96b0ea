"""A run that is killed at any instant, over and over, ends with the bits of one that never was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MODELS

CHILD = Path(__file__).with_name("crash_child.py")


def run(folder: Path, kind: str, seed: int, kills: int) -> Any:
    MODELS[kind].save(folder / "model", torch.bfloat16)
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, str(CHILD), str(folder), str(seed), str(kills)],
        env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=1200 + 20 * kills,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(tmp_path: Path, kind: str, clip: str, seed: int, kills: int) -> None:
    whole = run(tmp_path / f"whole-{clip}", kind, 0, 0)
    killed = run(tmp_path / f"killed-{clip}", kind, seed, kills)
    assert killed["killed"] == kills
    assert killed["digest"] == whole["digest"]
    assert killed["seen"] == whole["seen"], "a step gave other numbers after a resume"
    assert all(len(numbers) == 1 for numbers in whole["seen"].values())


@pytest.mark.parametrize("clip", ["clip", "noclip", "travel-clip", "travel-noclip", "device-travel-clip", "zo"])
def test_a_killed_run_ends_like_one_that_never_was(clip: str, tmp_path: Path) -> None:
    check(tmp_path, "llama", clip, seed=1, kills=3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "clip", "seed"),
    [
        ("llama-tied", "travel-clip", 2),
        ("qwen3_moe", "noclip", 3),
        ("qwen3_moe", "zo", 4),
        ("llama", "device-noclip", 5),
    ],
)
def test_a_hundred_kills_each(kind: str, clip: str, seed: int, tmp_path: Path) -> None:
    check(tmp_path, kind, clip, seed=seed, kills=100)
