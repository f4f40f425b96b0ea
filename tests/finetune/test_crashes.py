"""A run that is killed at any instant, over and over, ends with the bits of one that never was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from forks import Forks
from models import MODELS

CODE = "import sys, crash_child; crash_child.main(*sys.argv[1:])"


def check(forks: Forks, tmp_path: Path, kind: str, clip: str, seed: int, kills: int) -> None:
    done = forks.run(CODE, MODELS[kind].save(tmp_path / "model", torch.bfloat16), clip, seed, kills)
    assert done.returncode == 0, done.stderr[-3000:]
    whole, killed = json.loads(done.stdout)
    assert killed["digest"] == whole["digest"]
    assert killed["seen"] == whole["seen"], "a step gave other numbers after a resume"
    assert all(len(numbers) == 1 for numbers in whole["seen"].values())


@pytest.mark.parametrize("clip", ["clip", "noclip", "travel-clip", "travel-noclip", "device-travel-clip", "zo", "lora"])
def test_a_killed_run_ends_like_one_that_never_was(clip: str, forks: Forks, tmp_path: Path) -> None:
    check(forks, tmp_path, "llama", clip, seed=1, kills=3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "clip", "seed"),
    [
        ("llama-tied", "travel-clip", 2),
        ("qwen3_moe", "noclip", 3),
        ("qwen3_moe", "zo", 4),
        ("llama", "device-noclip", 5),
        ("llama", "device-share-clip", 6),
        ("qwen3_moe", "lora", 7),
    ],
)
def test_a_hundred_kills_each(kind: str, clip: str, seed: int, forks: Forks, tmp_path: Path) -> None:
    check(forks, tmp_path, kind, clip, seed=seed, kills=100)
