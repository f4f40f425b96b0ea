"""MeZO unit by unit equals MeZO with the whole model at once, and its log is all that a resume needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import MODELS
from test_full import batches, plain

import offload
from offload.kernels.reference import Along, move_along
from offload.tiers.commit import MANIFEST

EPS, RATE, SEED = 1e-2, 1e-2, 7


class PlainMezo:
    """The definition: move all weights, run, move them to the other side, run, update."""

    def __init__(self, model: Any) -> None:
        self.model, self._steps = model.eval(), 0

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
            move_along(base[name], Along(SEED, name), [(self._steps, by)], parameter.data)


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_it_equals_plain_mezo(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    MODELS[kind].save(tmp_path / "model", dtype)
    mezo = PlainMezo(plain(tmp_path / "model", dtype))
    options: dict[str, Any] = {
        "method": "zo", "zo_eps": EPS, "seed": SEED, "learning_rate": RATE, "offload_dir": tmp_path / "state",
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
    assert (tmp_path / "state" / MANIFEST).stat().st_size < 1000
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
