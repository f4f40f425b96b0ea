"""What a step of two blocks says of a model that nobody has probed."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import accumulate, count
from pathlib import Path

import pytest
from models import MODELS

from offload.checkpoint.numbers import numbers
from offload.checkpoint.skeleton import read_config
from offload.finetune.lora import Lora, adapt
from offload.finetune.pricing import Batch, kind_of, visits
from offload.finetune.small_step import NOTE, with_small_step
from offload.profile import Profile, preset

BATCH = Batch(rows=2, tokens=8)
GUESSED = preset("cpu-ddr5-nvme4")
TICK = 1.0  # seconds that pass whenever the clock is looked at


def seen(folder: Path, method: str, batch: Batch = BATCH, budget: int = 1 << 32, *, slows: bool = False) -> Profile:
    ticks = accumulate(count()) if slows else count()
    return with_small_step(
        GUESSED, numbers(folder).spec, partial(read_config, folder), batch,
        method=method, budget=budget, adapt=partial(adapt, lora=Lora(r=2)) if method == "lora" else None,  # type: ignore[arg-type]
        now=lambda: next(ticks) * TICK,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_block_is_priced_by_what_it_took(tmp_path: Path, name: str) -> None:
    folder = MODELS[name].save(tmp_path / "model")
    spec, profile = numbers(folder).spec, seen(folder, "full")
    assert profile.notes[-1] == NOTE
    found = visits(spec, profile, BATCH, "cpu")
    blocks = [found[u.name] for u in spec.units if u.layers]
    assert blocks
    assert all(visit.seconds == pytest.approx(TICK) for visit in blocks)
    assert all(visit.seen_s is not None for visit in found.values())


def test_more_micro_batches_are_timed_two_at_once_and_more_tokens_what_their_prices_say(tmp_path: Path) -> None:
    folder = MODELS["llama"].save(tmp_path / "model")
    spec = numbers(folder).spec
    one = visits(spec, seen(folder, "full"), BATCH, "cpu")
    eight = replace(BATCH, micro_batches=8)
    many = visits(spec, seen(folder, "full", eight), eight, "cpu")
    for name, visit in one.items():
        assert many[name].seconds == pytest.approx(4 * visit.seconds)  # by this clock two take as long as one
        assert many[name].backward_s(trains=True) == pytest.approx(4 * visit.backward_s(trains=True))
    wide = Batch(rows=1000, tokens=8)
    priced = [visits(spec, GUESSED, replace(wide, rows=rows), "cpu") for rows in (64, 1000)]
    found = visits(spec, seen(folder, "full", wide), wide, "cpu")
    for unit in (u for u in spec.units if u.layers):
        ratio = priced[1][unit.name].seconds / priced[0][unit.name].seconds
        assert found[unit.name].seconds == pytest.approx(ratio * TICK)


def test_without_a_backward_pass_weights_that_move_are_timed(tmp_path: Path) -> None:
    profile = seen(MODELS["llama"].save(tmp_path / "model"), "zo")
    assert {t.op for t in profile.ops} - {t.op for t in GUESSED.ops} == {"unit", "move_along"}
    assert sorted(t.shape for t in profile.ops if t.op == "move_along") == [(1,), (2,), (8,)]


def test_adapters_are_part_of_it(tmp_path: Path) -> None:
    folder = MODELS["llama"].save(tmp_path / "model")
    block = next(u for u in numbers(folder).spec.units if u.layers)
    tables = [t for t in seen(folder, "lora", slows=True).ops if t.shape == kind_of(block)]
    assert {t.op for t in tables} == {"unit", "unit_backward"}


def test_large_models_and_those_with_experts_stay_as_they_are_priced(tmp_path: Path) -> None:
    assert seen(MODELS["llama"].save(tmp_path / "model"), "full", budget=1000) is GUESSED
    assert seen(MODELS["mixtral"].save(tmp_path / "experts"), "full") is GUESSED
