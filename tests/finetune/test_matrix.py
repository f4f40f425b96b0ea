"""Twenty steps equal the in-memory loop for every combination of model, dtype, threads, tier and overlap: slow."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MODELS
from reference_loop import ReferenceLoop
from test_full import NUMBERS, B, F, batches, plain, rate

import offload
from offload.finetune import assemble_full
from offload.optim.adamw import AdamW
from offload.tiers.cells import lay_out_cell

pytestmark = pytest.mark.slow
STEPS = 20
TIERS: dict[str, dict[str, Any]] = {
    "disk": {"resident": 0, "activations": "disk"},
    "half": {"resident": 0.5, "activations": "recompute"},
    "memory": {"resident": 1.0, "activations": "keep"},
    "travelling": {"resident": 0, "resident_weights": 0.0},
}
DEFERS = {"travelling": 1.0, "half": 0.5}  # share of the state that is written in the backward pass


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def digest(tensor: torch.Tensor) -> str:
    return hashlib.blake2b(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy(), digest_size=12).hexdigest()


def shards_of(loop: ReferenceLoop, layouts: Any) -> list[str]:
    """The last gradient, cut as the optimizer gets it."""
    found = []
    for unit, layout in layouts.items():
        shapes = {n: (p.dtype, p.shape) for n, p in layout.places.items()}
        cell = lay_out_cell(unit, shapes)
        area = torch.zeros(cell.nbytes, dtype=torch.uint8)
        for name, place in cell.places.items():
            place.of(area).copy_(loop.gradients[name])
        found += [digest(shard.of(area)) for shard in cell.shards]
    return sorted(found)


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("dtype", [B, F], ids=["bf16", "f32"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "qwen3_moe"])
def test_every_way_equals_the_plain_loop(
    kind: str, dtype: torch.dtype, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses and norms of every step, every gradient of the last one, and the weights."""
    MODELS[kind].save(tmp_path / "model", dtype)
    clip = 0.5 if (dtype == B) == (threads == 2) else None
    loop = ReferenceLoop(plain(tmp_path / "model", dtype), max_grad_norm=clip, seed=3, **NUMBERS)
    for step in range(STEPS):
        loop.step(batches(step, 2), rate(step))
    wanted = {n: p.detach() for n, p in loop.model.named_parameters()}
    seen: list[str] = []
    own_step = AdamW.step

    def step_seen(self: AdamW, state: torch.Tensor, cell: torch.Tensor, numbers: Any, *, decays: bool) -> None:
        if numbers.step == STEPS:
            seen.append(digest(cell))
        own_step(self, state, cell, numbers, decays=decays)

    monkeypatch.setattr(AdamW, "step", step_seen)
    assemble = assemble_full.assemble
    for tier, overlaps in itertools.product(TIERS, (True, False)):
        forced = {"defers": DEFERS.get(tier, 0.0) if clip is not None else 0.0} | ({} if overlaps else {"slots": 1})
        monkeypatch.setattr(
            assemble_full,
            "assemble",
            lambda *parts, forced=forced, choice, **options: assemble(
                *parts, choice=replace(choice, **forced), **options
            ),
        )
        seen.clear()
        options = {"offload_dir": tmp_path / f"{tier}-{overlaps}", "max_grad_norm": clip, "seed": 3, "dtype": dtype}
        with offload.finetuning(tmp_path / "model", **options, **TIERS[tier], **NUMBERS) as trainer:
            results = [trainer.step(batches(step, 2), rate(step)) for step in range(STEPS)]
            trainer.flush()
            assert [r.loss for r in results] == loop.losses, (tier, overlaps)
            assert [r.grad_norm for r in results] == loop.norms, (tier, overlaps)
            gradients = shards_of(loop, trainer.training.cells.layouts)
            assert sorted(set(seen)) == sorted(set(gradients)), (tier, overlaps)  # a deferred update is made twice
            mine = trainer.weights()
            assert set(mine) == set(wanted)
            assert all(torch.equal(mine[n], w) for n, w in wanted.items()), (tier, overlaps)
