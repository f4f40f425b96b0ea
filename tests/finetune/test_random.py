"""Runs drawn at random: any model, method, optimizer, tier and device, interrupted in any way, beside one in memory.

A run is cut into parts. Each part has places of its own for weights, state and activations, does what users do between
steps, and ends as runs end: with a commit, without one, or by a disk that fails. Whatever happened, every loss, norm
and weight must be the reference's. A seed is a run.
"""

from __future__ import annotations

import contextlib
import random
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MODELS
from random_draws import STEPS, Batches, Draw, draw, fault, places, rings
from reference_loop import ReferenceLoop
from test_zeroth import PlainMezo
from transformers import AutoModelForCausalLM

import offload
from offload.finetune import assemble_full
from offload.finetune.choice import Choice
from offload.finetune.trainer import Trainer
from offload.kernels.chosen import Kernels
from offload.optim import make
from offload.runtime.training import Training
from offload.runtime.training_lanes import LOOSE
from offload.tiers.cells import page

Weights = dict[str, torch.Tensor]


@dataclass
class Truth:
    """The reference after 0, 1, ... steps."""

    results: list[tuple[float, float]] = field(default_factory=list)  # of each step
    weights: list[Weights] = field(default_factory=list)
    held_out: list[tuple[float, int]] = field(default_factory=list)


def truth_of(drawn: Draw, folder: Path) -> Truth:
    """The whole run in memory: plain loops for full and zo; for adapters, ours with everything in memory."""
    if drawn.method == "lora":
        return _in_memory(drawn, folder)
    found = Truth()
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=drawn.dtype).train()
    options = drawn.options
    if drawn.method == "zo":
        step = PlainMezo(model, options["zo_sparsity"], options["seed"]).step
    else:
        decay = options["weight_decay"]
        rule = make(options["optimizer"], Kernels("cpu", exact=False), weight_decay=decay)
        loop = ReferenceLoop(model, max_grad_norm=options["max_grad_norm"], seed=options["seed"], rule=rule)

        def step(given: Batches) -> tuple[float, float]:
            loop.step(given, options["learning_rate"])
            return loop.losses[-1], loop.norms[-1]

    for number in range(STEPS + 1):
        found.weights.append({n: p.detach().clone() for n, p in model.named_parameters()})
        found.held_out.append(_held_out(model, drawn.held_out))
        if number < STEPS:
            learnt = [b for b in drawn.steps[number] if (b["labels"][:, 1:] != -100).any()]
            found.results.append(step(learnt))
    return found


def _held_out(model: Any, given: Batches) -> tuple[float, int]:
    was = model.training
    model.eval()
    with torch.no_grad():
        counts = [int((b["labels"][:, 1:] != -100).sum()) for b in given]
        pairs = [(float(model(**b, use_cache=False).loss), n) for b, n in zip(given, counts, strict=True) if n]
    model.train(was)
    return sum(x * n for x, n in pairs), sum(n for _, n in pairs)


def _in_memory(drawn: Draw, folder: Path) -> Truth:
    found = Truth()
    with offload.finetuning(
        folder / "model", dtype=drawn.dtype, offload_dir=folder / "truth", activations="keep", resident=1.0,
        **drawn.options,
    ) as trainer:  # fmt: skip
        for number in range(STEPS + 1):
            found.weights.append({n: w.detach().clone() for n, w in trainer.weights().items()})
            found.held_out.append(trainer.evaluate(drawn.held_out))
            if number < STEPS:
                result = trainer.step(drawn.steps[number])
                found.results.append((result.loss, result.grad_norm))
    return found


def run(seed: int, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """One run. What it did is printed on the way."""
    rng = random.Random(seed)
    drawn = draw(rng)
    print(f"{seed}: {drawn.kind} {drawn.dtype} {drawn.options} shard_count={drawn.shard_count}")
    MODELS[drawn.kind].save(folder / "model", drawn.dtype)
    truth = truth_of(drawn, folder)
    assemble, forced = assemble_full.assemble, dict[str, Any]()

    def assembled(*parts: Any, choice: Choice, **options: Any) -> Trainer:
        mine = replace(choice, **forced.get("choice", {}))
        return assemble(*parts, **options | forced | {"choice": mine})

    patch.setattr(assemble_full, "assemble", assembled)
    whole = {"dtype": drawn.dtype, "offload_dir": folder / "state", "resume": True, **drawn.options}
    committed = 0
    while committed < STEPS:
        forced.clear()
        forced.update(rings(rng, drawn))
        given = whole | places(rng, drawn, folder)
        ending = rng.choice(("commit", "commit", "forget", "fail"))
        what, failing = fault(rng) if ending == "fail" else (ending, contextlib.nullcontext())
        print(f"  from {committed}: {given} {forced}; {what}")
        last = committed
        try:
            with failing, offload.finetuning(folder / "model", **given) as trainer:
                assert trainer.step_number == committed
                for target in sorted({min(STEPS, committed + rng.randint(1, 3)) for _ in range(rng.randint(1, 2))}):
                    last = target
                    _go(rng, drawn, truth, trainer, target, folder)
                    if ending != "forget" or rng.random() < 0.5:
                        trainer.commit()
                        committed = target
        except offload.OffloadError as error:
            if ending != "fail":
                raise
            print(f"  {type(error).__name__}: {error}"[:200])
            with offload.finetuning(folder / "model", **given) as trainer:
                assert trainer.step_number in (committed, last)
                committed = trainer.step_number
    with offload.finetuning(folder / "model", **whole) as trainer:
        assert trainer.step_number == STEPS
        _same(trainer, truth.weights[STEPS])


def _go(rng: random.Random, drawn: Draw, truth: Truth, trainer: Trainer, target: int, folder: Path) -> None:
    """Steps up to `target`, with what users do between them."""
    while trainer.step_number < target:
        number = trainer.step_number
        result = trainer.step(drawn.steps[number])
        assert (result.loss, result.grad_norm) == truth.results[number], number
        number += 1
        for act in rng.sample(("evaluate", "weights", "save", "flush", "keep", "nothing"), rng.randint(0, 2)):
            print(f"    after {number}: {act}")
            if act == "evaluate":
                assert trainer.evaluate(drawn.held_out) == truth.held_out[number], number
            elif act == "weights":
                _same(trainer, truth.weights[number])
            elif act == "flush":
                trainer.flush()
            elif act == "save":
                trainer.save(folder / "out")
                shutil.rmtree(folder / "out")
            elif act == "keep" and type(trainer.training) is Training:
                _keep(rng, trainer.training)


def _keep(rng: random.Random, training: Training) -> None:
    """Other cells stay in memory from now on."""
    if any(part.keeps for part in training.backprop.parts.values()):
        training.keep_graphs(0)
    layouts = training.cells.layouts
    units = [u for u, cell in layouts.items() if cell.places and u != LOOSE]
    kept = [u for u in units if rng.random() < 0.5]
    largest = max(c.nbytes for c in layouts.values())
    training.keep_cells(kept, (rng.choice((3, 4, 9)), page(largest)))


def _same(trainer: Trainer, wanted: Weights) -> None:
    mine = trainer.weights()
    assert set(mine) == set(wanted)
    for name, weights in wanted.items():
        assert torch.equal(mine[name].detach(), weights), name


@pytest.mark.parametrize("seed", [pytest.param(k, marks=pytest.mark.slow) if k > 1 else k for k in range(40)])
def test_whatever_a_run_is_its_numbers_are_those_in_memory(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(seed, tmp_path, monkeypatch)
