"""Adapters and zeroth order on an accelerator: the numbers of weights in main memory, within the given memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MODELS
from test_device import least
from test_full import batches

import offload

B, F = torch.bfloat16, torch.float32
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}, "learning_rate": 1e-2},
    "zo": {"method": "zo", "zo_eps": 1e-2, "zo_write_every": 2, "learning_rate": 1e-2},
}
KINDS = ["llama", "llama-tied", "gpt_neox", "qwen3_moe"]


def train(
    model: Path, state: Path, steps: range = range(4), **options: Any
) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Losses, norms and evaluations; and what was trained."""
    found: list[Any] = []
    with offload.finetuning(model, offload_dir=state, seed=3, tokens=48, resume=True, **options) as trainer:
        for step in steps:
            result = trainer.step(batches(step, 1 + 2 * (step % 2)))
            found.append((result.loss, result.grad_norm))
            if step % 2:
                found.append(trainer.evaluate(batches(9, 2)))
        trainer.commit()
        weights = {n: t.detach().clone() for n, t in trainer.weights().items()}
        if "gpu_memory" in options:
            assert trainer.training.device.name == "emulated"
            statistics = trainer.training.device.statistics()
            assert 0 < statistics.peak_bytes <= options["gpu_memory"]
            assert statistics.uploaded_bytes > 0
    return found, weights


def smallest(model: Path, state: Path, **options: Any) -> int:
    """Bytes of device memory that an error asks for."""
    with pytest.raises(offload.BudgetError, match=r"gpu_memory=1\.00 KiB is too small") as error:
        offload.finetuning(model, offload_dir=state, tokens=48, device="emulated", gpu_memory="1KiB", **options)
    return least(str(error.value))


def same(one: tuple[list[Any], dict[str, torch.Tensor]], other: tuple[list[Any], dict[str, torch.Tensor]]) -> bool:
    return one[0] == other[0] and all(torch.equal(other[1][n], t) for n, t in one[1].items())


ROOMS: tuple[dict[str, int], ...] = ({}, {"more": 1 << 18}, {"resident_weights": 0}, {"more": 1 << 24})


def rooms() -> Iterator[Any]:
    """Every model and method with the least room and more, or with none in memory and with room for all."""
    kinds = [("llama", B), ("llama-tied", F), ("gpt_neox", F), ("qwen3_moe", B)]
    for (i, (kind, dtype)), (j, method) in itertools.product(enumerate(kinds), enumerate(METHODS)):
        for first in (0, 2):
            is_slow = (i + j + first // 2) % 2
            yield pytest.param(kind, dtype, method, ROOMS[first : first + 2], marks=[pytest.mark.slow] * is_slow)


@pytest.mark.parametrize(("kind", "dtype", "method", "rooms"), list(rooms()))
def test_on_a_device_equals_in_memory(
    kind: str, dtype: torch.dtype, method: str, rooms: Sequence[dict[str, int]], tmp_path: Path
) -> None:
    model = MODELS[kind].save(tmp_path / "model", dtype)
    expected = train(model, tmp_path / "whole", **METHODS[method])
    memory = smallest(model, tmp_path / "none", **METHODS[method])
    for number, room in enumerate(rooms):
        options = {"device": "emulated", "gpu_memory": memory + room.get("more", 0)} | METHODS[method]
        options |= {k: v for k, v in room.items() if k != "more"}
        assert same(expected, train(model, tmp_path / f"part{number}", **options)), options


@pytest.mark.parametrize("method", list(METHODS))
def test_a_run_moves_to_a_device_and_back(method: str, tmp_path: Path) -> None:
    model = MODELS["llama"].save(tmp_path / "model", B)
    expected = train(model, tmp_path / "whole", **METHODS[method])
    device = {"device": "emulated", "gpu_memory": smallest(model, tmp_path / "none", **METHODS[method])}
    first, _ = train(model, tmp_path / "part", range(2), **METHODS[method])
    second, _ = train(model, tmp_path / "part", range(2, 3), **METHODS[method], **device)
    third, last = train(model, tmp_path / "part", range(3, 4), **METHODS[method])
    assert same(expected, (first + second + third, last))


@pytest.mark.parametrize("weights", ["lossless", "int8"])
def test_packed_weights_go_up_as_they_are(weights: str, tmp_path: Path) -> None:
    model = MODELS["llama"].save(tmp_path / "model", B)
    offload.pack(model, tmp_path / "packed", weights=weights)
    expected = train(tmp_path / "packed", tmp_path / "whole", **METHODS["lora"])
    memory = smallest(tmp_path / "packed", tmp_path / "none", **METHODS["lora"])
    found = train(tmp_path / "packed", tmp_path / "part", device="emulated", gpu_memory=memory, **METHODS["lora"])
    assert same(expected, found)


def test_each_side_goes_up_once_a_step(tmp_path: Path) -> None:
    model = MODELS["llama"].save(tmp_path / "model", B)
    options = METHODS["zo"] | {"device": "emulated", "gpu_memory": "8MiB"}
    with offload.finetuning(model, offload_dir=tmp_path / "state", **options) as trainer:
        weights = sum(t.numel() * t.element_size() for t in trainer.weights().values())
        before = trainer.training.device.statistics().uploaded_bytes
        trainer.step(batches(0, 3))
        sent = trainer.training.device.statistics().uploaded_bytes - before
    assert 2 * weights <= sent <= 2 * weights + 2 * 8 * 4096


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    model = MODELS["llama"].save(tmp_path / "model", B)
    options: dict[str, Any] = {"offload_dir": tmp_path / "state", "device": "emulated"}
    with pytest.raises(offload.UsageError, match="needs gpu_memory"):
        offload.finetuning(model, method="zo", **options)
    with pytest.raises(offload.UsageError, match=r"activations='keep': .* there are auto, recompute"):
        offload.finetuning(model, method="lora", gpu_memory="1GiB", activations="keep", **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("kind", KINDS)
def test_where_weights_live_changes_nothing_on_a_gpu(method: str, kind: str, tmp_path: Path) -> None:
    """All on the card for adapters, and nothing for either method: the same bits."""
    model = MODELS[kind].save(tmp_path / "model", B)
    options = METHODS[method] | {"device": "cuda"}
    roomy = train(model, tmp_path / "roomy", **options)
    memory = smallest(model, tmp_path / "none", **METHODS[method])
    found = []
    with offload.finetuning(
        model, offload_dir=tmp_path / "small", seed=3, tokens=48, resident_weights=0, **options | {"gpu_memory": memory}
    ) as trainer:
        for step in range(4):
            result = trainer.step(batches(step, 1 + 2 * (step % 2)))
            found.append((result.loss, result.grad_norm))
    assert found == [pair for pair in roomy[0] if pair not in roomy[0][2::3]]
