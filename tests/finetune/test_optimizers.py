"""Every optimizer: its cost is what it says, it is what it is named after, and offloaded it equals itself in memory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MODELS
from test_full import B, batches
from torch import nn

import offload
from offload.kernels.chosen import Kernels
from offload.optim import OPTIMIZERS, make
from offload.optim.base import Numbers

KERNELS = Kernels("cpu", exact=False)


@pytest.mark.parametrize("name", list(OPTIMIZERS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_state_is_what_it_costs(name: str, dtype: torch.dtype) -> None:
    optimizer = make(name, KERNELS)
    assert optimizer.name == name
    count = 4096
    nbytes = optimizer.state_nbytes(count)
    assert nbytes == pytest.approx(optimizer.state_bytes_per_param * count, rel=1e-3)
    state, weights = torch.full((nbytes,), 77, dtype=torch.uint8), torch.randn(count).to(dtype)
    optimizer.start(state, weights)
    cell = torch.empty_like(weights)
    optimizer.weights(state, cell)
    assert torch.equal(cell, weights)
    cell = torch.zeros_like(weights)
    optimizer.step(state, cell, Numbers(step=1, learning_rate=1e-2), decays=True)
    assert torch.equal(cell, weights), "no gradient, no decay: no change"
    gradient = torch.randn(count).to(dtype)
    for step in range(2, 6):
        cell = gradient.clone()
        optimizer.step(state, cell, Numbers(step=step, learning_rate=1e-2, grad_scale=0.5), decays=True)
    after = torch.empty_like(cell)
    optimizer.weights(state, after)
    assert torch.equal(after, cell), "what a step leaves in the cell is what the state holds"
    assert float(((after - weights) * gradient).float().sum()) < 0, "downhill"


@pytest.mark.parametrize(
    ("name", "peer", "tolerance"),
    [("adamw", torch.optim.AdamW, 1e-5), ("adamw_8bit", torch.optim.AdamW, 2e-2), ("sgd", torch.optim.SGD, 1e-6)],
)
def test_it_is_what_it_is_named_after(name: str, peer: Any, tolerance: float) -> None:
    count = 2048
    given = {"momentum": 0.9} if name == "sgd" else {}
    optimizer = make(name, KERNELS, weight_decay=0.1, **given)
    parameter = nn.Parameter(torch.randn(count))
    theirs = peer([parameter], lr=1e-2, weight_decay=0.1, **given)
    state = torch.empty(optimizer.state_nbytes(count), dtype=torch.uint8)
    optimizer.start(state, parameter.detach())
    for step in range(1, 8):
        parameter.grad = torch.randn(count)
        cell = parameter.grad.clone()
        theirs.step()
        optimizer.step(state, cell, Numbers(step=step, learning_rate=1e-2), decays=True)
    torch.testing.assert_close(cell, parameter.detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n != "adamw"])  # which has a test of its own
@pytest.mark.parametrize("clip", [0.5, None], ids=["clip", "no clip"])
def test_tiers_change_nothing(name: str, clip: float | None, tmp_path: Path) -> None:
    """All on disk, and all in memory with graphs kept: the same numbers, also after a resume."""
    MODELS["qwen3"].save(tmp_path / "model", B)
    found = []
    for place, options in (("disk", {"resident": 0, "activations": "recompute"}), ("memory", {"resident": 1.0})):
        given = {"optimizer": name, "max_grad_norm": clip, "learning_rate": 1e-2, "offload_dir": tmp_path / place}
        numbers = []
        with offload.finetuning(tmp_path / "model", **given, **options) as trainer:
            numbers += [trainer.step(batches(step, 2)) for step in range(2)]
            trainer.commit()
        with offload.finetuning(tmp_path / "model", resume=True, **given, **options) as trainer:
            numbers += [trainer.step(batches(step, 2)) for step in range(2, 4)]
            trainer.flush()
            weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        found.append(([(r.loss, r.grad_norm) for r in numbers], weights))
    (one, left), (other, right) = found
    assert one == other
    assert all(math.isfinite(loss) for loss, _ in one)
    assert all(torch.equal(w, right[n]) for n, w in left.items())


def test_a_number_that_it_has_not_is_named() -> None:
    with pytest.raises(offload.UsageError, match="momentum"):
        make("adamw", KERNELS, momentum=0.9)
