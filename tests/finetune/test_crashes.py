"""A run that is killed at any instant, over and over, ends with the bits of one that never was."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MODELS

CHILD = Path(__file__).with_name("crash_child.py")


class Trials:
    """The process that trains and kills. One for all tests: it takes as long to start as several runs."""

    def __init__(self, errors: Path) -> None:
        self._errors = errors
        path = os.pathsep.join(filter(None, sys.path))
        with errors.open("w") as file:
            self._process = subprocess.Popen(
                [sys.executable, str(CHILD)], env=os.environ | {"PYTHONPATH": path},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True,
            )  # fmt: skip

    def run(self, folder: Path, kind: str, seed: int, kills: int) -> Any:
        """What the child answers, see there."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        MODELS[kind].save(folder / "model", torch.bfloat16)
        process.stdin.write(json.dumps([str(folder), seed, kills]) + "\n")
        process.stdin.flush()
        answers, _, _ = select.select([process.stdout], [], [], 1200 + 20 * kills)
        assert answers, "no answer in time"
        found = json.loads(process.stdout.readline() or "null")
        assert found, self._errors.read_text()[-3000:]
        return found

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trials]:
    made = Trials(tmp_path_factory.mktemp("trials") / "errors.txt")
    yield made
    made.close()


def check(trials: Trials, tmp_path: Path, kind: str, clip: str, seed: int, kills: int) -> None:
    whole = trials.run(tmp_path / f"whole-{clip}", kind, 0, 0)
    killed = trials.run(tmp_path / f"killed-{clip}", kind, seed, kills)
    assert killed["killed"] == kills
    assert killed["digest"] == whole["digest"]
    assert killed["seen"] == whole["seen"], "a step gave other numbers after a resume"
    assert all(len(numbers) == 1 for numbers in whole["seen"].values())


@pytest.mark.parametrize("clip", ["clip", "noclip", "travel-clip", "travel-noclip", "device-travel-clip", "zo", "lora"])
def test_a_killed_run_ends_like_one_that_never_was(clip: str, trials: Trials, tmp_path: Path) -> None:
    check(trials, tmp_path, "llama", clip, seed=1, kills=3)


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
def test_a_hundred_kills_each(kind: str, clip: str, seed: int, trials: Trials, tmp_path: Path) -> None:
    check(trials, tmp_path, kind, clip, seed=seed, kills=100)
