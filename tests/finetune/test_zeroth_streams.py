"""Zeroth-order training of weights that stream: the bits of weights in memory, with few writes, and after any kill."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MODELS
from safetensors.torch import load_file
from test_full import batches

import offload
from offload.runtime.bases import Bases
from offload.tiers.commit import MANIFEST
from offload.tiers.images import Images

OPTIONS: dict[str, Any] = {"method": "zo", "zo_eps": 1e-2, "seed": 7, "learning_rate": 1e-2}
STEPS = 6
B, F = torch.bfloat16, torch.float32


def train(model: Path, state: Path, steps: range, **options: Any) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Losses, norms and an evaluation; and the weights at the end."""
    found: list[Any] = []
    with offload.finetuning(model, offload_dir=state, resume=True, **OPTIONS | options) as trainer:
        assert trainer.step_number == steps.start
        assert bool(trainer.training.streams.travelling) == ("resident_weights" in options)
        for step in steps:
            result = trainer.step(batches(step, 1 + step % 2))
            found.append((result.loss, result.grad_norm))
        found.append(trainer.evaluate(batches(9, 2)))
        trainer.commit()
        weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        trainer.save(state.with_suffix(".out"))
    return found, weights


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def saved(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for path in sorted(folder.glob("*.safetensors")) for n, t in load_file(path).items()}


CASES = [("llama", B), ("llama-tied", F), ("gpt2", F), ("qwen3_moe", B), ("mixtral", F)]  # the other dtypes are slow
OTHERS = [(kind, F if dtype == B else B) for kind, dtype in CASES]


@pytest.mark.parametrize(("kind", "dtype"), CASES + [pytest.param(*c, marks=pytest.mark.slow) for c in OTHERS])
def test_weights_that_stream_are_those_in_memory(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = MODELS[kind].save(tmp_path / "model", dtype)
    before = {p.name: p.read_bytes() for p in model.iterdir()}
    expected = train(model, tmp_path / "whole", range(STEPS))
    for number, options in enumerate(
        (
            {"resident_weights": 0, "zo_write_every": 100},
            {"resident_weights": 0, "zo_write_every": 1},
            {"resident_weights": 0.5, "zo_write_every": 2},
            {"resident_weights": 0.3},
        )
    ):
        found = train(model, tmp_path / f"part{number}", range(STEPS), **options)
        assert found[0] == expected[0], options
        assert same(found[1], expected[1]), options
        assert same(saved(tmp_path / f"part{number}.out"), saved(tmp_path / "whole.out")), options
    assert {p.name: p.read_bytes() for p in model.iterdir()} == before, "the checkpoint is nobody's to change"


def test_threads_change_nothing(tmp_path: Path) -> None:
    model, threads = MODELS["llama"].save(tmp_path / "model", torch.bfloat16), torch.get_num_threads()
    options = {"resident_weights": 0, "zo_write_every": 2}
    _, expected = train(model, tmp_path / "a", range(1), **options)
    torch.set_num_threads(1)
    try:
        _, alone = train(model, tmp_path / "b", range(1), **options)
    finally:
        torch.set_num_threads(threads)
    assert expected.keys() == alone.keys()
    for name in expected:  # losses may differ in the last bit, as products do; directions may not
        torch.testing.assert_close(expected[name], alone[name], rtol=1e-2, atol=1e-3)


def test_a_resume_goes_on_wherever_weights_live_then(tmp_path: Path) -> None:
    model = MODELS["llama"].save(tmp_path / "model", torch.bfloat16)
    whole, weights = train(model, tmp_path / "whole", range(STEPS))
    state = tmp_path / "state"
    parts = [
        train(model, state, range(2), resident_weights=0, zo_write_every=1),
        train(model, state, range(2, 3), resident_weights=0.5, zo_write_every=1),
        train(model, state, range(3, 4)),
        train(model, state, range(4, 6), resident_weights=0, zo_write_every=100),
    ]
    losses = [x for found, _ in parts for x in found[:-1]]
    assert losses == whole[:-1]
    assert same(parts[-1][1], weights)
    assert parts[-1][0][-1] == whole[-1]


class Killed(BaseException):
    """Where a process would have ended."""


def moments(monkeypatch: pytest.MonkeyPatch, at: int) -> Iterator[None]:
    """Kills at the `at`-th moment at which anything on disk has changed or is about to."""
    left = at

    def counting(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            for after in (False, True):
                if not after:
                    left -= 1
                    if left == 0:
                        raise Killed
                    found = function(*args, **kwargs)
                else:
                    left -= 1
                    if left == 0:
                        raise Killed
            return found

        return call

    with monkeypatch.context() as patch:
        for name in ("rename", "fsync", "unlink"):
            patch.setattr(os, name, counting(getattr(os, name)))
        patch.setattr(Images, "abandon", lambda images: images.file.close())  # a process that is gone removes nothing
        for owner, name in ((Images, "write"), (Images, "finish"), (Bases, "_take")):
            patch.setattr(owner, name, counting(getattr(owner, name)))
        yield


KILLED: dict[str, Any] = OPTIONS | {"resident_weights": 0, "zo_write_every": 1}


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Of five steps that nobody kills."""
    folder = tmp_path_factory.mktemp("whole")
    model = MODELS["llama"].save(folder / "model", torch.bfloat16)
    with offload.finetuning(model, offload_dir=folder / "state", **KILLED) as trainer:
        return [trainer.step(batches(step, 1)).loss for step in range(5)]


@pytest.mark.parametrize("at", range(1, 60, 3))
def test_a_kill_at_any_moment_resumes_at_the_last_commit(
    at: int, losses: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MODELS["llama"].save(tmp_path / "model", torch.bfloat16)
    options = KILLED | {"offload_dir": tmp_path / "state"}
    done = 0
    for _ in moments(monkeypatch, at):
        try:
            with offload.finetuning(model, resume=True, **options) as trainer:
                for step in range(4):
                    trainer.step(batches(step, 1))
                    if step % 2:
                        trainer.commit()
                        done = step + 1
        except Killed:
            pass
    with offload.finetuning(model, resume=True, **options) as trainer:
        first = trainer.step_number
        assert first in (done, done + 2)  # the commit may have been made when it was killed
        found = [trainer.step(batches(step, 1)).loss for step in range(first, 5)]
        assert found == losses[first:]
        trainer.commit()
    assert len(list((tmp_path / "state").glob("weights-*"))) <= 1


def test_a_long_log_is_not_applied_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that stay are written by a commit once a resume would take long."""
    monkeypatch.setattr("offload.runtime.zeroth.REPLAYED", 2)
    model = MODELS["llama"].save(tmp_path / "model", torch.bfloat16)
    whole, weights = train(model, tmp_path / "whole", range(STEPS), resident_weights=0.5)
    for first in (0, 3):
        found, part = train(model, tmp_path / "part", range(first, first + 3), resident_weights=0.5, zo_write_every=2)
        assert found[:-1] == whole[first : first + 3]
        assert any(p.name.startswith("weights-3") or first for p in (tmp_path / "part").iterdir())
    assert same(part, weights)


def test_damage_is_found_and_named(tmp_path: Path) -> None:
    model = MODELS["llama"].save(tmp_path / "model", torch.bfloat16)
    train(model, tmp_path / "state", range(3), resident_weights=0, zo_write_every=1)
    (file,) = (tmp_path / "state").glob("weights-*.bin")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(offload.CheckpointError, match=rf"{file.name} is damaged"):
        offload.finetuning(model, offload_dir=tmp_path / "state", resume=True, **OPTIONS)
    assert (tmp_path / "state" / MANIFEST).exists()


def test_a_budget_that_is_too_small_says_what_would_do(tmp_path: Path) -> None:
    model = MODELS["llama"].save(tmp_path / "model", torch.bfloat16)
    with pytest.raises(offload.BudgetError, match=r"both sides of the largest unit .* Give at least \d"):
        offload.finetuning(model, offload_dir=tmp_path / "state", cpu_memory="64MiB", **OPTIONS)
    with pytest.raises(offload.UsageError, match="zo_write_every=0"):
        offload.finetuning(model, offload_dir=tmp_path / "state", zo_write_every=0, **OPTIONS)
