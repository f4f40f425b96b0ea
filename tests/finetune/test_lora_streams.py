"""Adapters beside frozen weights that stream, plain or packed: the numbers of weights in memory, for any budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import MODELS
from test_full import batches

import offload

B, F = torch.bfloat16, torch.float32
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}


def train(
    model: Path, state: Path, steps: range = range(3), **options: Any
) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Losses, norms and evaluations; and the adapters."""
    found: list[Any] = []
    with offload.finetuning(
        model, method="lora", lora=LORA, offload_dir=state, seed=3, resume=True, learning_rate=1e-2, **options
    ) as trainer:
        assert bool(trainer.training.streams.travelling) == ("resident_weights" in options)
        for step in steps:
            result = trainer.step(batches(step, 1 + 2 * (step % 2)))
            found.append((result.loss, result.grad_norm))
            if step == 1:
                found.append(trainer.evaluate(batches(9, 2)))
        trainer.commit()
        trainer.flush()
        weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "lora_" in n}
    return found, weights


CASES = [  # model, dtype, clip norm; each model's other dtype is slow
    ("llama", B, 0.5), ("llama-tied", F, None), ("gpt_neox", B, 0.5), ("qwen3_moe", F, None), ("mixtral", B, 0.5),
]  # fmt: skip
OTHERS = [(kind, F, None) if dtype == B else (kind, B, 0.5) for kind, dtype, _ in CASES]


@pytest.mark.parametrize(("kind", "dtype", "clip"), CASES + [pytest.param(*c, marks=pytest.mark.slow) for c in OTHERS])
def test_frozen_weights_that_stream_are_those_in_memory(
    kind: str, dtype: torch.dtype, clip: float | None, tmp_path: Path
) -> None:
    model = MODELS[kind].save(tmp_path / "model", dtype)
    expected = train(model, tmp_path / "whole", max_grad_norm=clip)
    for number, options in enumerate(
        (
            {"resident_weights": 0},
            {"resident_weights": 0.5},
            {"resident_weights": 0.5, "activations": "keep"},
            {"resident_weights": 0, "activations": "disk", "resident": 0},
        )
    ):
        found = train(model, tmp_path / f"part{number}", max_grad_norm=clip, **options)
        assert found[0] == expected[0], options
        assert all(torch.equal(found[1][n], t) for n, t in expected[1].items()), options


def test_weights_are_read_once_there_and_once_back(tmp_path: Path) -> None:
    model = MODELS["llama"].save(tmp_path / "model", B)
    options: dict[str, Any] = {"lora": LORA, "offload_dir": tmp_path / "state", "resident_weights": 0}
    with offload.finetuning(model, method="lora", **options) as trainer:
        for step in range(3):
            trainer.step(batches(step, 2))
        streams = trainer.training.streams
        assert trainer.training.streams.statistics().restarts == 0
        computed = [s.name for s in trainer.training.timeline.spans if s.lane == "compute"]
        names = trainer.training.backprop.order
        forward = [f"forward {n}" for n in names[:-1]]
        assert computed == 3 * [*forward, *(f"backward {n}" for n in reversed(names))], "each visit counts once"
        visits = streams.statistics().entered
        assert visits == 3 * (2 * len(streams.travelling) - (streams.travelling[-1] == "lm_head"))


@pytest.mark.parametrize("weights", ["lossless", "int8", "int4"])
def test_packed_weights_may_be_frozen(weights: str, tmp_path: Path) -> None:
    model = MODELS["llama"].save(tmp_path / "model", B)
    offload.pack(model, tmp_path / "packed", weights=weights)
    expected = train(tmp_path / "packed", tmp_path / "whole")
    found = train(tmp_path / "packed", tmp_path / "part", resident_weights=0)
    assert found[0] == expected[0]
    assert all(torch.equal(found[1][n], t) for n, t in expected[1].items())
    if weights == "lossless":
        assert expected[0] == train(model, tmp_path / "plain")[0]


def test_a_resume_goes_on_with_another_budget(tmp_path: Path) -> None:
    model = MODELS["llama"].save(tmp_path / "model", B)
    whole, weights = train(model, tmp_path / "whole", range(4))
    first, _ = train(model, tmp_path / "part", range(2), resident_weights=0)
    second, last = train(model, tmp_path / "part", range(2, 4), resident_weights=0.5)
    assert first + second == whole
    assert all(torch.equal(last[n], t) for n, t in weights.items())


def test_a_budget_that_is_too_small_says_what_would_do(tmp_path: Path) -> None:
    model = MODELS["llama"].save(tmp_path / "model", B)
    with pytest.raises(offload.BudgetError, match=r"the graph of a unit .* Give at least \d"):
        offload.finetuning(model, method="lora", offload_dir=tmp_path / "state", cpu_memory="64MiB")
