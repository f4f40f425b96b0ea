"""What a step takes is known before it runs: of every unit to the byte, and the peak of the process nearly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MODELS
from patience import HANGS_S
from test_full import B

import offload
from offload.finetune.rehearsal import THREAD, Needs, rehearse, working

CHILD = Path(__file__).with_name("memory_child.py")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "llama-tied", "qwen3", "gpt2", "qwen3_moe", "mixtral"])
def test_graphs_and_inputs_are_foretold(kind: str, attention: str, tmp_path: Path) -> None:
    MODELS[kind].save(tmp_path / "model", B)
    ids = torch.randint(3, 300, (2, 96), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "labels": ids}
    options: dict[str, Any] = {"resident": 0, "resident_weights": 0.5, "attn_implementation": attention}
    with offload.finetuning(tmp_path / "model", offload_dir=tmp_path / "state", **options) as trainer:
        training = trainer.training
        training.root.train()
        before, random = {n: p.data_ptr() for n, p in training.parameters.items()}, torch.get_rng_state()
        needs = rehearse(
            training.backprop.parts, training.parameters.values(), lambda b: trainer._loss(b)(), batch
        )  # fmt: skip
        assert needs is not None
        assert {n: p.data_ptr() for n, p in training.parameters.items()} == before
        assert torch.equal(torch.get_rng_state(), random)
        trainer.step([batch, batch])
        assert list(needs) == training.backprop.order
        for name, part in training.backprop.parts.items():
            assert needs[name].waits == part.swap_nbytes
            assert needs[name].graph == pytest.approx(part.graph_nbytes, rel=1e-3)
        assert trainer.spare is not None
        assert trainer.spare.predicted_nbytes is not None


def test_models_that_cannot_be_tried_are_not(tmp_path: Path) -> None:
    with offload.finetuning(torch.nn.Sequential(torch.nn.Linear(8, 8)), offload_dir=tmp_path) as trainer:
        parts = trainer.training.backprop.parts
        parameters = trainer.training.parameters.values()
        assert rehearse(parts, parameters, lambda _: None, {"x": torch.ones(2, 8)}) is None
        ids = torch.zeros(2, 8, dtype=torch.int64)

        def fails(_: Any) -> None:
            raise RuntimeError("not on zeros")

        assert rehearse(parts, parameters, fails, {"input_ids": ids}) is None


def test_the_widest_point() -> None:
    block = Needs(graph=50 << 20, waits=1 << 20, outputs=1 << 20, gradients=4 << 20, scratch=2 << 20, sums=8 << 20)
    head = Needs(graph=0, waits=1 << 20, outputs=90 << 20, gradients=6 << 20, scratch=12 << 20, sums=12 << 20)
    one, many = working([block, head], 1), working([block, block, head], 4, 5 << 20)
    assert one.waits == 2 << 20
    assert many.waits == 12 << 20
    assert many.at_once - one.at_once == (5 << 20) + 4 * THREAD
    assert one.nbytes == one.waits + one.at_once


def _trained(*arguments: object) -> dict[str, Any]:
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, str(CHILD), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=HANGS_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["peak"] <= found["budget"], found
    return found


def test_the_peak_stays_under_the_budget_with_longer_rows(tmp_path: Path) -> None:
    """The first step leaves memory that is used, and that a later step needs."""
    _trained(tmp_path, 4, 2, 1000 << 20, 48, 48, 160, 160, 256, 48)


@pytest.mark.parametrize(("rows", "micro_batches", "above"), [(8, 1, 945 << 20), (1, 8, 1005 << 20)])
def test_the_peak_stays_under_the_budget_and_is_foretold(
    rows: int, micro_batches: int, above: int, tmp_path: Path
) -> None:
    """Tight budgets, in which weights have to travel, and eight times a micro-batch that would be small."""
    found = _trained(tmp_path, rows, micro_batches, above, 256, 256)
    assert found["predicted"] == pytest.approx(found["first"], rel=0.1), found
