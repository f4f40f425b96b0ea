"""Full fine-tuning equals the plain in-memory loop, bit for bit: losses, norms and weights."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import MODELS
from reference_loop import ReferenceLoop

import offload
from offload.finetune.trainer import Trainer

pytestmark = pytest.mark.usefixtures("two_threads")
NUMBERS = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
STEPS = 3


def batches(step: int, count: int, rows: int = 2, length: int = 24) -> list[dict[str, torch.Tensor]]:
    """Micro-batches of a step; some labels are masked, so that they differ in weight."""
    generator = torch.Generator().manual_seed(step)
    found = []
    for k in range(count):
        ids = torch.randint(3, 320, (rows, length), generator=generator)
        labels = ids.clone()
        labels[0, : 3 + 4 * k] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


def plain(folder: Path, dtype: torch.dtype) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).train()


def rate(step: int) -> float:
    return 1e-2 / (1 + step)


def check(trainer: Trainer, loop: ReferenceLoop, micro_batches: int, steps: int = STEPS) -> None:
    """Both train on the same batches; nothing may differ."""
    for step in range(steps):
        given = batches(step, micro_batches)
        result = trainer.step(given if micro_batches > 1 else given[0], rate(step))
        loop.step(given, rate(step))
        assert result.loss == loop.losses[-1], step
        assert result.grad_norm == loop.norms[-1], step
    mine = trainer.weights()
    for name, parameter in loop.model.named_parameters():
        assert torch.equal(mine[name].detach(), parameter.detach()), name


B, F = torch.bfloat16, torch.float32
CASES = [  # model, dtype, micro-batches, clip norm: every value with every model once; all of them together are slow
    ("llama", B, 1, 0.5), ("llama", F, 3, None), ("llama-tied", B, 3, 0.5), ("qwen3", F, 1, None), ("qwen3", B, 3, 0.5),
    ("gpt2", B, 1, None), ("gpt2", F, 3, 0.5), ("qwen3_moe", B, 3, None), ("mixtral", F, 1, 0.5),
]  # fmt: skip
KINDS = ("llama", "llama-tied", "qwen3", "gpt2", "qwen3_moe", "mixtral", "gemma3", "phi3", "olmo2", "bloom", "opt")
ALL = [c for c in itertools.product(KINDS, (B, F), (1, 3), (0.5, None)) if c not in CASES]


@pytest.mark.parametrize(
    ("kind", "dtype", "micro_batches", "clip"), CASES + [pytest.param(*c, marks=pytest.mark.slow) for c in ALL]
)
def test_offloaded_equals_in_memory(
    kind: str, dtype: torch.dtype, micro_batches: int, clip: float | None, tmp_path: Path
) -> None:
    MODELS[kind].save(tmp_path / "model", dtype)
    loop = ReferenceLoop(plain(tmp_path / "model", dtype), max_grad_norm=clip, seed=5, **NUMBERS)
    with offload.finetuning(
        tmp_path / "model", max_grad_norm=clip, offload_dir=tmp_path / "state", seed=5, dtype=dtype, resident=0,
        activations="recompute", **NUMBERS
    ) as trainer:  # fmt: skip
        check(trainer, loop, micro_batches)


@pytest.mark.parametrize("clip", [0.5, None], ids=["clip", "no clip"])
@pytest.mark.parametrize("resident", [0, 0.5, 1.0])
@pytest.mark.parametrize("activations", ["keep", "auto"])
def test_memory_changes_nothing(clip: float | None, resident: float, activations: str, tmp_path: Path) -> None:
    """Shards that stay and graphs that are kept, with a commit and a resume on the way."""
    MODELS["llama-tied"].save(tmp_path / "model", B)
    loop = ReferenceLoop(plain(tmp_path / "model", B), max_grad_norm=clip, **NUMBERS)
    options = {"max_grad_norm": clip, "offload_dir": tmp_path / "state", "resident": resident, **NUMBERS}
    with offload.finetuning(tmp_path / "model", activations=activations, **options) as trainer:
        check(trainer, loop, 2)
        assert trainer.spare is not None
        assert trainer.spare.graphs_nbytes > 0
        total = trainer.training.state_nbytes
        assert resident * total * 0.5 <= trainer.spare.state_nbytes <= resident * total
        trainer.extra = {"at": 3}
        trainer.commit()
        trainer.step(batches(9, 2))
    with offload.finetuning(tmp_path / "model", resume=True, **options) as trainer:
        assert (trainer.step_number, trainer.extra) == (STEPS, {"at": 3})
        check(trainer, loop, 1)


@pytest.mark.parametrize("clip", [0.5, None], ids=["clip", "no clip"])
@pytest.mark.parametrize("resident", [None, 0.5], ids=["as fits", "half"])
def test_longer_rows_change_nothing_but_what_is_kept(
    clip: float | None, resident: float | None, tmp_path: Path
) -> None:
    """Memory is divided again where a step has more tokens than any before, with room for somewhat more."""
    MODELS["llama-tied"].save(tmp_path / "model", B)
    loop = ReferenceLoop(plain(tmp_path / "model", B), max_grad_norm=clip, **NUMBERS)
    options = {"max_grad_norm": clip, "offload_dir": tmp_path / "state", "resident": resident, **NUMBERS}
    divided = []
    with offload.finetuning(tmp_path / "model", **options) as trainer:
        for step, (count, length) in enumerate([(2, 24), (2, 16), (2, 40), (2, 48), (1, 32), (3, 48), (2, 24)]):
            given, before = batches(step, count, length=length), trainer.spare
            result = trainer.step(given, rate(step))
            loop.step(given, rate(step))
            assert (result.loss, result.grad_norm) == (loop.losses[-1], loop.norms[-1]), step
            divided.append(trainer.spare is not before)
            if step == 3:
                trainer.commit()
        mine = trainer.weights()
        assert all(torch.equal(mine[n], p) for n, p in loop.model.named_parameters())
    assert divided == [True, False, True, False, False, True, False]
