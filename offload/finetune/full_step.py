"""The tuple of a step of full fine-tuning with memory divided, and what it takes on a machine."""

from __future__ import annotations

from collections.abc import Callable

from offload.finetune.activations import slots_of
from offload.finetune.division import Asked, Division
from offload.finetune.pricing import sums_s, visits
from offload.finetune.sharing import update_bytes_per_s, updates_there_s
from offload.optim.base import Optimizer
from offload.planner.schedule import Schedule
from offload.planner.training import emit_training, has_copies
from offload.planner.training_cost import StepCost, step_cost
from offload.planner.training_stash import with_inputs
from offload.planner.training_steps import Update
from offload.profile import Profile
from offload.tiers.cells import SHARD_COUNT
from offload.tiers.device_state import SLOTS as STATE_SLOTS


def schedule_of(asked: Asked, division: Division) -> Schedule:
    """The step that repeats."""
    copies = has_copies(asked.clips, 4 if asked.spec.dtype == "float32" else 2)
    schedule = emit_training(
        division.units, division.loose, clips=asked.clips, is_due=asked.clips,
        reads="weights" if copies else "masters", writes_copies=copies,
        holds_there=bool(division.going_up),
    )  # fmt: skip
    if asked.wishes.activations != "disk":
        return schedule
    inputs = asked.inputs_nbytes * asked.batch.micro_batches
    return with_inputs(schedule, dict.fromkeys((unit.name for unit in division.units), inputs))


def cost_of(schedule: Schedule, asked: Asked, division: Division) -> StepCost:
    """What it takes, replayed with the lanes and rings of a run."""
    rule, profile, batch, accelerator = asked.rule, asked.profile, asked.batch, division.accelerator
    forward_s, backward_s = _seconds(asked, division)
    slots = {
        "state": division.slots,
        "cells": division.cells.slots,
        "device": division.there.slots if division.there is not None else 0,
        "stash": slots_of(asked.inputs_nbytes * batch.micro_batches),
        "device state": STATE_SLOTS,
    }
    return step_cost(
        schedule, profile, slots=slots, forward_s=forward_s, backward_s=backward_s, update_s=update_s(rule, profile),
        crossing_s=lambda nbytes: accelerator.crossing_s(nbytes, profile) if accelerator else 0.0,
        aside_s=lambda step: updates_there_s(step, rule, profile, accelerator) if accelerator else 0.0,
        contention=accelerator.contention(profile, update_bytes_per_s(rule, profile)) if accelerator else None,
    )  # fmt: skip


def _seconds(asked: Asked, division: Division) -> tuple[dict[str, float], dict[str, float]]:
    """Of each unit's forward and backward. The backward of one whose graph is not there runs it again."""
    profile, batch, last = asked.profile, asked.batch, division.units[-1].name
    each = visits(asked.spec, profile, batch, asked.processor)
    backward_s = {}
    for unit in asked.spec.units:
        visit, count = each[unit.name], sum(t.elements for t in unit.tensors)
        again = 0.0 if unit.name in division.graphs or unit.name == last else visit.seconds
        backward_s[unit.name] = visit.backward_s(trains=True) + sums_s(count, profile, batch, asked.processor) + again
    return {name: visit.seconds for name, visit in each.items()}, backward_s


def update_s(rule: Optimizer, profile: Profile) -> Callable[[Update], float]:
    """Seconds of a shard's update, on the CPU."""
    per_byte = rule.cost.seconds(SHARD_COUNT, profile) / max(1.0, rule.cost.state_bytes * SHARD_COUNT)
    return lambda step: per_byte * step.nbytes
