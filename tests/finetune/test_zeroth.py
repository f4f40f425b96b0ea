"""MeZO unit by unit equals MeZO with the whole model at once, and its log is all that a resume needs."""

from __future__ import annotations

import itertools
import math
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MODELS
from test_full import batches, plain

import offload
from offload.kernels import choose
from offload.kernels.reference import Along
from offload.runtime import zeroth
from offload.tiers.commit import MANIFEST

EPS, RATE, SEED = 1e-2, 1e-2, 7
B, F = torch.bfloat16, torch.float32


class PlainMezo:
    """The definition: move all weights, run, move them to the other side, run, update; with the same kernel.

    Args:
        model: in memory.
        sparsity: share of each parameter's weights that stays as it is.
        seed: of the directions.
    """

    def __init__(self, model: Any, sparsity: float = 0.0, seed: int = SEED) -> None:
        self.model, self._steps = model.eval(), 0
        self._move_along = choose("move_along", "cpu").function()
        self._along = {n: Along(seed, n, threshold(p, sparsity)) for n, p in model.named_parameters()}

    @torch.no_grad()
    def step(self, given: list[dict[str, torch.Tensor]]) -> tuple[float, float]:
        self._steps += 1
        counts = [int((b["labels"][:, 1:] != -100).sum()) for b in given]
        base = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        losses = []
        for by in (EPS, -EPS):
            self._move(base, by)
            losses.append([float(self.model(**b, use_cache=False).loss) for b in given])
        shares = [n / sum(counts) for n in counts]
        projected = sum((p - m) * s for p, m, s in zip(*losses, shares, strict=True)) / (2 * EPS)
        self._move(base, -RATE * projected)
        means = [(p + m) / 2 for p, m in zip(*losses, strict=True)]
        return sum(x * n for x, n in zip(means, counts, strict=True)) / sum(counts), abs(projected)

    def _move(self, base: dict[str, torch.Tensor], by: float) -> None:
        for name, parameter in self.model.named_parameters():
            self._move_along(base[name], self._along[name], [(self._steps, by)], parameter.data)


def threshold(weights: torch.Tensor, sparsity: float) -> float:
    """The magnitude up to which weights move, by sorting them."""
    if not sparsity:
        return math.inf
    moving = weights.numel() - math.floor(sparsity * weights.numel())
    found = weights.detach().float().abs().flatten().sort().values[moving - 1]
    if weights.dtype is torch.float32:
        found = (found.view(torch.int32) | 0xFFFF).view(torch.float32)
    return float(found)


CASES = [  # model, dtype, sparsity: every two values of them together; the others are slow
    ("llama", B, 0.0), ("llama", F, 0.75), ("llama-tied", B, 0.75), ("llama-tied", F, 0.0),
    ("gpt2", B, 0.0), ("gpt2", F, 0.75), ("qwen3_moe", B, 0.75), ("qwen3_moe", F, 0.0),
]  # fmt: skip
OTHERS = set(itertools.product({kind for kind, _, _ in CASES}, (B, F), (0.0, 0.75))) - set(CASES)


@pytest.mark.parametrize(
    ("kind", "dtype", "sparsity"), CASES + [pytest.param(*c, marks=pytest.mark.slow) for c in sorted(OTHERS, key=str)]
)
def test_it_equals_plain_mezo(kind: str, dtype: torch.dtype, sparsity: float, tmp_path: Path) -> None:
    MODELS[kind].save(tmp_path / "model", dtype)
    mezo = PlainMezo(plain(tmp_path / "model", dtype), sparsity)
    options: dict[str, Any] = {
        "method": "zo", "zo_eps": EPS, "seed": SEED, "learning_rate": RATE, "offload_dir": tmp_path / "state",
        "zo_sparsity": sparsity,
    }  # fmt: skip
    for first in (0, 3):  # the second time from the log
        with offload.finetuning(tmp_path / "model", resume=True, **options) as trainer:
            assert trainer.step_number == first
            for step in range(first, first + 3):
                result = trainer.step(batches(step, 1 + step % 2))
                assert (result.loss, result.grad_norm) == mezo.step(batches(step, 1 + step % 2)), step
                if step == 1:
                    trainer.evaluate(batches(9, 1))
            trainer.commit()
            trainer.flush()
            theirs = dict(mezo.model.named_parameters())
            assert all(torch.equal(p, theirs[n]) for n, p in trainer.model.named_parameters())
    assert (tmp_path / "state" / MANIFEST).stat().st_size < (5000 if sparsity else 1000)
    assert sorted(p.name for p in (tmp_path / "state").iterdir()) == [MANIFEST, "state.lock"]


def test_a_log_belongs_to_its_seed(tmp_path: Path) -> None:
    MODELS["llama"].save(tmp_path / "model", torch.bfloat16)
    options: dict[str, Any] = {"method": "zo", "offload_dir": tmp_path / "state"}
    with offload.finetuning(tmp_path / "model", seed=1, **options) as trainer:
        trainer.step(batches(0, 1))
        trainer.commit()
        with pytest.raises(offload.UsageError, match="another process"):
            offload.finetuning(tmp_path / "model", seed=1, resume=True, **options)
    with pytest.raises(offload.CheckpointError, match="its seed is 1, this run's is 2"):
        offload.finetuning(tmp_path / "model", seed=2, resume=True, **options)
    with pytest.raises(offload.UsageError, match="resume"):
        offload.finetuning(tmp_path / "model", seed=1, **options)


@pytest.mark.parametrize("part", ["Streams", "WriteBack", "Backprop"])
def test_what_was_opened_is_closed_where_a_part_fails(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    MODELS["llama"].save(tmp_path / "model", torch.bfloat16)
    options: dict[str, Any] = {
        "method": "zo", "device": "emulated", "gpu_memory": "4MiB", "tokens": 64, "resident_weights": 0,
        "offload_dir": tmp_path / "state",
    }  # fmt: skip
    opened, closed = list[object](), list[object]()
    for kind in (zeroth.TwoSides, zeroth.Streams):
        monkeypatch.setattr(kind, "__init__", _noting(kind.__init__, opened))
        monkeypatch.setattr(kind, "close", _noting(kind.close, closed))

    def failing(*_: object, **__: object) -> None:
        raise RuntimeError("a part failed")

    before = threading.active_count()
    with monkeypatch.context() as broken:
        broken.setattr(zeroth, part, failing)
        with pytest.raises(RuntimeError, match="a part failed"):
            offload.finetuning(tmp_path / "model", **options)
    assert closed == opened[::-1]
    assert len(opened) == (1 if part == "Streams" else 2)
    assert threading.active_count() == before
    offload.finetuning(tmp_path / "model", **options).close()


def _noting(method: Callable[..., None], made: list[object]) -> Callable[..., None]:
    def noted(self: object, *parts: Any, **options: Any) -> None:
        method(self, *parts, **options)
        made.append(self)

    return noted


def test_sparse_mezo_leaves_the_largest_weights_alone(tmp_path: Path) -> None:
    MODELS["llama"].save(tmp_path / "model", torch.bfloat16)
    before = dict(plain(tmp_path / "model", torch.bfloat16).named_parameters())
    options: dict[str, Any] = {
        "method": "zo", "zo_eps": EPS, "zo_sparsity": 0.75, "learning_rate": 1.0, "offload_dir": tmp_path / "state",
    }  # fmt: skip
    with offload.finetuning(tmp_path / "model", **options) as trainer:
        trainer.step(batches(0, 1))
        for name, weights in trainer.weights().items():
            limit = threshold(before[name], 0.75)
            stays = before[name].detach().abs() > limit
            assert torch.equal(weights[stays], before[name].detach()[stays]), name
            assert stays.float().mean() <= 0.75
            assert (weights != before[name].detach())[~stays].float().mean() > 0.5, name
        trainer.commit()
    with pytest.raises(offload.CheckpointError, match=r"its sparsity is 0.75, this run's is 0.5"):
        offload.finetuning(tmp_path / "model", resume=True, **options | {"zo_sparsity": 0.5})
    with pytest.raises(offload.UsageError, match=r"zo_sparsity=1: expected float < 1"):
        offload.finetuning(tmp_path / "model", resume=True, **options | {"zo_sparsity": 1})
    with pytest.raises(offload.UsageError, match="no backward pass"):
        offload.finetuning(tmp_path / "model", resume=True, activations="keep", **options)


@pytest.mark.parametrize("method", ["zo", "lora"])
def test_a_state_belongs_to_its_checkpoint(method: str, tmp_path: Path) -> None:
    """A copy is the same one; other weights of the same shapes in its place are not."""
    MODELS["llama"].save(tmp_path / "model", torch.bfloat16)
    options: dict[str, Any] = {"method": method, "offload_dir": tmp_path / "state"}
    with offload.finetuning(tmp_path / "model", **options) as trainer:
        trainer.step(batches(0, 1))
        trainer.commit()
    shutil.copytree(tmp_path / "model", tmp_path / "copy")
    shutil.rmtree(tmp_path / "model")
    with offload.finetuning(tmp_path / "copy", resume=True, **options) as trainer:
        assert trainer.step_number == 1
    shard = sorted((tmp_path / "copy").glob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    what = r"[\d,]+ bytes in \d+ files, headers [0-9a-f]{12}, weights [0-9a-f]{12}"
    with pytest.raises(offload.CheckpointError, match=rf"its checkpoint is '{what}', this run's is '{what}'") as found:
        offload.finetuning(tmp_path / "copy", resume=True, **options)
    one, other = (text.rpartition(", ") for text in re.findall(what, str(found.value)))
    assert one[0] == other[0], "only the weights differ"
    assert one[2] != other[2]
