"""The share of updates that an accelerator makes: its closed form, the bytes that cross, and what the clock chooses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from offload.checkpoint.outline import outline
from offload.finetune.accelerator import Accelerator
from offload.finetune.forecast import forecast
from offload.finetune.pricing import Batch
from offload.kernels.chosen import Kernels
from offload.optim import make
from offload.planner.schedule import Download, Schedule, Upload
from offload.planner.training import emit_training
from offload.planner.training_cost import step_cost
from offload.planner.training_steps import TrainedShard, TrainedUnit, Update
from offload.planner.update_share import balanced_share, seconds_per_param, spread
from offload.profile import preset
from offload.units import GIB

COUNT = 1 << 20  # parameters of a shard
rates = st.floats(1e8, 1e11)


@given(rates, rates)
def test_no_share_is_better_than_the_balance(params_per_s: float, bytes_per_s: float) -> None:
    share = balanced_share(params_per_s, bytes_per_s)
    assert 0 <= share < 1
    least = seconds_per_param(share, params_per_s, bytes_per_s)
    for k in range(101):
        assert seconds_per_param(k / 100, params_per_s, bytes_per_s) >= least * (1 - 1e-9)
    ratio = bytes_per_s / params_per_s
    assert share == pytest.approx(max(0.0, (ratio - 2) / (ratio + 10)))
    assert (share == 0) == (ratio <= 2)


def test_figures_of_the_formula() -> None:
    """Those of a link of 25 GB/s, and how many times shorter updates are than the CPU's alone."""
    for billions, share, gain in ((0.5, 0.80, 5.0), (1.0, 0.66, 2.9), (2.0, 0.47, 1.9)):
        found = balanced_share(billions * 1e9, 25e9)
        assert found == pytest.approx(share, abs=0.01)
        seconds = [seconds_per_param(f, billions * 1e9, 25e9) for f in (0.0, found)]
        assert seconds[0] / seconds[1] == pytest.approx(gain, abs=0.1)


def test_main_memory_leaves_little_to_gain() -> None:
    alone = seconds_per_param(0.0, 2e9, 25e9, memory_bytes_per_s=60e9)
    assert alone / seconds_per_param(0.47, 2e9, 25e9, memory_bytes_per_s=60e9) < 1.25


@given(st.lists(st.integers(1, 1000), max_size=60), st.floats(0, 1))
def test_shards_of_a_share(counts: list[int], share: float) -> None:
    names = [(f"s{k}", n) for k, n in enumerate(counts)]
    chosen = spread(names, share)
    taken = sum(n for name, n in names if name in chosen)
    assert abs(taken - share * sum(counts)) <= max(counts, default=0)
    assert spread(names, 0.0) == frozenset()
    assert spread(names, 1.0) == {name for name, _ in names}


def unit(name: str, *, stays_there: bool, going_up: int, shards: int = 4) -> TrainedUnit:
    """AdamW in bf16; weights and state stay in main memory."""
    found = tuple(
        TrainedShard(
            name=f"{name}[{k}]", nbytes=12 * COUNT, masters_nbytes=4 * COUNT, stays=True, goes_up=k < going_up,
            cell_nbytes=2 * COUNT,
        )
        for k in range(shards)
    )  # fmt: skip
    return TrainedUnit(
        name=name, nbytes=2 * COUNT * shards, shards=found, uploads=True, stays_there=stays_there
    )  # fmt: skip


def step(clips: bool, *, stays_there: bool, going_up: int, units: int = 6) -> Schedule:
    order = [unit(f"u{k}", stays_there=stays_there, going_up=going_up) for k in range(units)]
    loose = unit("(loose)", stays_there=True, going_up=going_up)
    return emit_training(order, loose, clips=clips, is_due=clips, holds_there=going_up > 0)


@pytest.mark.parametrize("clips", [True, False], ids=["clip", "no clip"])
@pytest.mark.parametrize("going_up", range(5))
def test_bytes_that_cross(clips: bool, going_up: int) -> None:
    """With a place there, gradients and weights of what is updated there do not cross: 2 + 10 f bytes each way."""
    params, share = 7 * 4 * COUNT, going_up / 4
    schedule = step(clips, stays_there=True, going_up=going_up)
    up, down = (sum(s.nbytes for s in schedule if isinstance(s, kind)) for kind in (Upload, Download))
    assert up == down == int((2 + 10 * share) * params)
    schedule = step(clips, stays_there=False, going_up=going_up)
    up, down = (sum(s.nbytes for s in schedule if isinstance(s, kind)) for kind in (Upload, Download))
    place, ring, last = 4 * COUNT, 6 * 4 * COUNT, 4 * COUNT  # the last unit's backward follows its forward at once
    assert up == int((2 + 10 * share) * place + (4 + 12 * share) * ring - 2 * last)
    weights = 2 * share * (ring - last) if clips else 0  # made there, and wanted again for the backward
    assert down == int((2 + 10 * share) * place + (2 + 12 * share) * ring + weights)


@pytest.mark.parametrize("clips", [True, False], ids=["clip", "no clip"])
@pytest.mark.parametrize("stays_there", [True, False], ids=["place", "slot"])
def test_the_clock_finds_the_updates_in_the_time_of_the_closed_form(clips: bool, stays_there: bool) -> None:
    """Where updates are all there is to do, and the CPU and the link finish together."""
    profile, params_per_s, bytes_per_s = preset("cpu-ddr5-nvme4"), 1e9, 16e9

    def seconds(going_up: int, shards: int = 4, units: int = 24) -> float:
        schedule = step(clips, stays_there=stays_there, going_up=going_up, units=units)
        return step_cost(
            schedule, profile, slots={"device": 3, "device state": 4}, forward_s={}, backward_s={},
            update_s=lambda step: step.nbytes / 12 / params_per_s if isinstance(step, Update) else 0.0,
            crossing_s=lambda nbytes: nbytes / bytes_per_s,
        ).seconds / (4 * COUNT * (units + 1))  # fmt: skip

    alone, shared = seconds(0), seconds(2)
    assert alone >= 0.99 * seconds_per_param(0.0, params_per_s, bytes_per_s)
    assert shared >= 0.99 * seconds_per_param(0.5, params_per_s, bytes_per_s)
    assert shared < 0.85 * alone


def test_cells_that_travel_come_back_to_their_ring_behind_their_slot_on_the_device() -> None:
    """Where nothing is written back, a cell's slot goes back once the device's has."""
    order = [replace(unit(f"u{k}", stays_there=False, going_up=2), stays=False) for k in range(8)]
    schedule = emit_training(order, None, clips=False, is_due=False, reads="masters", holds_there=True)
    found = step_cost(
        schedule, preset("cpu-ddr5-nvme4"), slots={"device": 3, "device state": 4, "cells": 3}, forward_s={},
        backward_s={}, update_s=lambda step: 0.0, crossing_s=lambda nbytes: nbytes / 16e9,
    )  # fmt: skip
    assert found.seconds > 0


def test_a_share_is_chosen_where_it_pays(tmp_path: Path) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12, "vocab_size": 8000}
    transformers.LlamaConfig(**sizes, num_attention_heads=8, dtype="bfloat16").save_pretrained(tmp_path)
    spec = outline(tmp_path, None).spec
    kernels = Kernels("cpu", exact=False)

    def chosen(name: str, device: str, optimizer: str = "adamw", link: float | None = None) -> float:
        return forecast(
            spec, make(optimizer, kernels), preset(name), batch=Batch(rows=1, tokens=64), clips=False, budget=32 * GIB,
            base=GIB, accelerator=Accelerator(name=device, memory=8 * GIB, link_bytes_per_s=link), update_share=None,
        ).update_share  # fmt: skip

    assert 0 < chosen("h100-gen5-nvme5x4", "cuda:0") < 1
    assert chosen("h100-gen5-nvme5x4", "cuda:0", "sgd") == 0
    assert chosen("rtx3060-gen3-nvme3", "emulated", link=1e9) == 0, "the emulated one updates with the same CPU"
