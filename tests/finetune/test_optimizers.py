"""Every optimizer: its cost is what it says, it is what it is named after, and offloaded it equals a plain loop."""

from __future__ import annotations

import math
from dataclasses import replace
from math import isqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MODELS
from reference_loop import ReferenceLoop
from test_full import B, batches, check, plain
from torch import nn

import offload
from offload.kernels.chosen import Kernels
from offload.optim import OPTIMIZERS, make
from offload.optim.base import Numbers
from offload.profile import Curve, OpTable, preset
from offload.tiers.cells import lay_out_cell

KERNELS = Kernels("cpu", exact=False)


@pytest.mark.parametrize("name", list(OPTIMIZERS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_state_is_what_it_costs(name: str, dtype: torch.dtype) -> None:
    optimizer = make(name, KERNELS)
    assert optimizer.name == name
    count = 1 << 26
    assert optimizer.state_nbytes(shape_of(name, count)) == pytest.approx(optimizer.cost.state_bytes * count, rel=0.02)
    shape = shape_of(name, 4096)
    nbytes = optimizer.state_nbytes(shape)
    state, weights = torch.full((nbytes,), 77, dtype=torch.uint8), torch.randn(shape).to(dtype)
    optimizer.start(state, weights)
    cell = torch.empty_like(weights)
    optimizer.weights(state, cell)
    assert torch.equal(cell, weights)
    cell = torch.zeros_like(weights)
    optimizer.step(state, cell, Numbers(step=1, learning_rate=1e-2), decays=True)
    assert torch.equal(cell, weights), "no gradient, no decay: no change"
    gradient = torch.randn(shape).to(dtype)
    for step in range(2, 6):
        cell = gradient.clone()
        optimizer.step(state, cell, Numbers(step=step, learning_rate=1e-2, grad_scale=0.5), decays=True)
    after = torch.empty_like(cell)
    optimizer.weights(state, after)
    assert torch.equal(after, cell), "what a step leaves in the cell is what the state holds"
    masters = state[: 4 * math.prod(shape)].view(torch.float32).view(shape)
    assert torch.equal(after, masters.to(dtype)), "the state begins with the masters"
    assert float(((after - weights) * gradient).float().sum()) < 0, "downhill"


def shape_of(name: str, count: int) -> tuple[int, ...]:
    """A shard of `count` parameters: a matrix, where an optimizer asks for whole rows."""
    return (isqrt(count), isqrt(count)) if make(name, KERNELS).whole_rows else (count,)


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_seconds_follow_from_a_machine(name: str) -> None:
    """Measured where the profile has measured it, else by memory and arithmetic."""
    cost, machine = make(name, KERNELS).cost, preset("cpu-ddr5-nvme4")
    assert cost.seconds(2_000_000, machine) == pytest.approx(2 * cost.seconds(1_000_000, machine), rel=0.1)
    curve = Curve.of([(1_000_000, 0.5, 0.0), (2_000_000, 1.0, 0.0)])
    table = OpTable(
        op="adamw_step", implementation="cpu", processor="cpu", format="bfloat16", shape=(), over="params", curve=curve
    )
    measured = replace(machine, ops=(table,))
    assert (cost.seconds(1_000_000, measured) == 0.5) == (name == "adamw")


@pytest.mark.parametrize("shape", [(2048,), (64, 32), (32, 64)], ids=str)
@pytest.mark.parametrize(
    ("name", "peer", "tolerance"),
    [
        ("adamw", torch.optim.AdamW, 1e-5),
        ("adamw_8bit", torch.optim.AdamW, 2e-2),
        ("sgd", torch.optim.SGD, 1e-6),
        ("adafactor", torch.optim.Adafactor, 1e-5),
    ],
)
def test_it_is_what_it_is_named_after(name: str, peer: Any, tolerance: float, shape: tuple[int, ...]) -> None:
    given: dict[str, Any] = {"sgd": {"momentum": 0.9}, "adafactor": {"eps": (1e-30, 1e-3)}}.get(name, {})
    own = given | ({"scale_parameter": True} if name == "adafactor" else {})
    optimizer = make(name, KERNELS, weight_decay=0.1, **own)
    shape = shape if optimizer.whole_rows else (2048,)
    parameter = nn.Parameter(torch.randn(shape))
    theirs = peer([parameter], lr=1e-2, weight_decay=0.1, **given)
    state = torch.empty(optimizer.state_nbytes(shape), dtype=torch.uint8)
    optimizer.start(state, parameter.detach())
    for step in range(1, 8):
        parameter.grad = torch.randn(shape)
        cell = parameter.grad.clone()
        theirs.step()
        optimizer.step(state, cell, Numbers(step=step, learning_rate=1e-2), decays=True)
    torch.testing.assert_close(cell, parameter.detach(), rtol=tolerance, atol=tolerance)


def test_apollo_stretches_rows_as_adamw_does() -> None:
    """With gradients that stay as they are, AdamW's steps are their signs; apollo's rows have the length of those."""
    rows, columns = 96, 256
    optimizer = make("apollo", KERNELS, rank=128, growth=1e9)
    weights = torch.zeros(rows, columns)
    state = torch.empty(optimizer.state_nbytes((rows, columns)), dtype=torch.uint8)
    optimizer.start(state, weights)
    gradient = torch.randn(rows, columns) * torch.logspace(-4, 2, rows).unsqueeze(1)  # rows of very different sizes
    for step in range(1, 4):
        before, cell = weights, gradient.clone()
        optimizer.step(state, cell, Numbers(step=step, learning_rate=1.0), decays=True)
        weights = cell
        lengths = (weights - before).norm(dim=1) / columns**0.5
        assert float(lengths.min()) > 0.7
        assert float(lengths.max()) < 1.4
        torch.testing.assert_close(
            torch.nn.functional.cosine_similarity(before - weights, gradient), torch.ones(rows), rtol=0, atol=1e-3
        )


def test_apollo_limits_the_growth_of_steps() -> None:
    optimizer = make("apollo", KERNELS, rank=16, growth=0.5)
    state = torch.empty(optimizer.state_nbytes((32, 32)), dtype=torch.uint8)
    optimizer.start(state, torch.zeros(32, 32))
    norms = []
    before = torch.zeros(32, 32)
    for step in range(1, 4):
        cell = torch.randn(32, 32)
        optimizer.step(state, cell, Numbers(step=step, learning_rate=1.0), decays=False)
        norms.append(float((cell - before).norm()))
        before = cell.clone()
    assert norms[1:] == pytest.approx([norms[0] / 2, norms[0] / 4], rel=1e-3)


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n != "adamw"])  # which has a test of its own
@pytest.mark.parametrize("kind", ["llama-tied", "qwen3_moe"])
def test_offloaded_equals_a_plain_loop(name: str, kind: str, tmp_path: Path) -> None:
    MODELS[kind].save(tmp_path / "model", B)
    given = {"weight_decay": 0.1} | ({"optimizer_args": {"rank": 8}} if name == "apollo" else {})
    rule = make(name, KERNELS, weight_decay=0.1, **given.get("optimizer_args", {}))  # type: ignore[arg-type]
    loop = ReferenceLoop(plain(tmp_path / "model", B), max_grad_norm=0.5, rule=rule)
    with offload.finetuning(
        tmp_path / "model", max_grad_norm=0.5, offload_dir=tmp_path / "state", optimizer=name, resident=0.5, **given
    ) as trainer:  # type: ignore[arg-type]
        check(trainer, loop, 2)


def test_whole_rows_are_cut_where_rows_end() -> None:
    """Of large matrices, a shard is as many rows as fit; every element is in one shard."""
    shapes = {"a": (B, (10, 300)), "stack": (B, (3, 4, 256)), "v": (B, (300,)), "long": (B, (2, 3000))}
    cell = lay_out_cell("u", shapes, 1024, whole_rows=True)
    assert [s.shape for s in cell.shards] == [
        (3, 300), (3, 300), (3, 300), (1, 300), (4, 256), (4, 256), (4, 256), (1, 3000), (1, 3000), (300,)
    ]  # fmt: skip
    area = torch.zeros(cell.nbytes, dtype=torch.uint8)
    for shard in cell.shards:
        shard.of(area).add_(1)
    assert all(bool((place.of(area) == 1).all()) for place in cell.places.values())
    assert sum(shard.count for shard in cell.shards) == sum(math.prod(shape) for _, shape in shapes.values())


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n != "adamw"])
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
    with pytest.raises(offload.UsageError, match=r"does not take momentum; it takes betas, eps, weight_decay"):
        make("adamw", KERNELS, momentum=0.9)
    with pytest.raises(offload.UsageError, match="rank=0"):
        make("apollo", KERNELS, rank=0)
    with pytest.raises(offload.UsageError, match="'apolo' is not known; there are adamw"):
        make("apolo", KERNELS)
