"""What a step of full fine-tuning will take, before anything is loaded: memory is divided as a run divides it, and the
step tuple that follows is priced on a machine's profile."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from offload.errors import BudgetError
from offload.finetune.accelerator import Accelerator, plan_there
from offload.finetune.activations import RING, slots_of
from offload.finetune.assemble import SLOTS
from offload.finetune.memory import HOLES, MARGIN, SLACK, Wishes, first_cells
from offload.finetune.pricing import Batch, sums_s, visits
from offload.finetune.sharing import likely_shares, update_bytes_per_s, updates_there_s
from offload.optim.base import Optimizer
from offload.optim.there import why_not_there
from offload.planner.cells import CellPlan, plan_cells
from offload.planner.schedule import Schedule
from offload.planner.training import asides, deferring, emit_training, has_copies
from offload.planner.training_cost import StepCost, step_cost
from offload.planner.training_stash import with_inputs
from offload.planner.training_steps import TrainedShard, TrainedUnit, Update
from offload.planner.update_share import spread
from offload.profile import Profile
from offload.runtime.masters import STAGES
from offload.specs import ModelSpec, TensorSpec, UnitSpec
from offload.tiers.cells import SHARD_COUNT, page
from offload.tiers.device_state import SLOTS as STATE_SLOTS

DEEPER = (16, 24, 32, 48, 64)  # slots, that are tried
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the state, to be written in the backward pass, that are tried
WORTH = 0.97  # of the time, to be worth more memory
TOO_LONG = 1.05  # times the shortest step of as deep a ring: deferring more will not make up for that
LOSSES = 0.5  # of the logits in two and in four bytes: a loss leaves them as they are, with the gradient in their place


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Attributes:
    schedule: the step tuple.
    cost: what it takes.
    weights_nbytes: of cells that stay in memory.
    graphs_nbytes: of graphs that are kept from forward to backward.
    state_nbytes: of optimizer state that stays in memory.
    scratch_nbytes: on disk, for cells that travel.
    room_nbytes: taken there at most: until the first step has been measured, more cells travel.
    defers: share of the state that is best written in the backward pass.
    update_share: of the updates, that the accelerator makes.
    slots: of the ring of state, in shards.
    gradient_nbytes: of sums of gradients, a unit's and the next one's.
    activation_nbytes: beside graphs that are kept: inputs of units, one graph, the loss.
    ring_nbytes: of the rings of state and of cells.
    process_nbytes: of the process, with what is set aside for allocators.
    there: bytes of the accelerator's memory by class.
    """

    schedule: Schedule
    cost: StepCost
    weights_nbytes: int
    graphs_nbytes: int
    state_nbytes: int
    scratch_nbytes: int = 0
    slots: int = 0
    gradient_nbytes: int = 0
    activation_nbytes: int = 0
    ring_nbytes: int = 0
    process_nbytes: int = 0
    room_nbytes: int = 0
    defers: float = 0.0
    update_share: float = 0.0
    there: Mapping[str, int] = field(default_factory=dict)

    def memory(self) -> dict[str, int]:
        """Bytes of main memory by class."""
        return {
            "weights": self.weights_nbytes,
            "optimizer": self.state_nbytes,
            "gradients": self.gradient_nbytes,
            "activations": self.activation_nbytes + self.graphs_nbytes,
            "buffers": self.ring_nbytes,
            "process, margin": self.process_nbytes,
        }

    def takes_from(self, other: Forecast) -> bool:
        """Whether a deeper ring, or what is deferred, is at the cost of anything else."""
        mine, others = self.memory(), other.memory()
        return any(mine[name] < others[name] for name in ("weights", "optimizer", "activations")) or (
            self.cost.read_bytes > other.cost.read_bytes
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return self.cost.as_dict() | {
            "weights_in_memory_bytes": self.weights_nbytes,
            "graphs_in_memory_bytes": self.graphs_nbytes,
            "state_in_memory_bytes": self.state_nbytes,
            "scratch_bytes": self.scratch_nbytes,
            "state_slots": self.slots,
            "state_in_backward": self.defers,
            "update_share": self.update_share,
        }


def forecast(
    spec: ModelSpec,
    rule: Optimizer,
    profile: Profile,
    *,
    batch: Batch,
    clips: bool,
    budget: int,
    base: int,
    accelerator: Accelerator | None = None,
    wishes: Wishes | None = None,
    update_share: float | None = 0.0,
) -> Forecast:
    """The step that repeats, with the ring of state that makes it shortest.

    A unit's backward is long, and its updates follow at once: a ring that holds its whole state lets the disk work
    meanwhile, and may be worth weights that travel. With clipping state moves in the forward pass, which is short; a
    share of it can be written in the backward pass instead, which wants such a ring as well.

    Args:
        rule: the optimizer.
        budget: bytes for the whole process.
        base: what it takes before anything of the model.
        accelerator: what computes; None: the CPU.
        wishes: what a user insists on.
        update_share: of the updates that it makes itself; None: what makes a step shortest.

    Raises:
        BudgetError: it cannot be.
    """
    if accelerator is not None:
        accelerator = accelerator.sized(spec, batch.count)
    with _uncollected():
        return _searched(spec, rule, profile, batch, clips, budget, base, accelerator, wishes or Wishes(), update_share)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without the collector of cycles: steps are thousands of objects without any, among the libraries' million."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _searched(
    spec: ModelSpec,
    rule: Optimizer,
    profile: Profile,
    batch: Batch,
    clips: bool,
    budget: int,
    base: int,
    accelerator: Accelerator | None,
    wishes: Wishes,
    update_share: float | None,
) -> Forecast:
    first = update_share or 0.0
    best = _forecast(spec, rule, profile, batch, clips, budget, base, SLOTS, accelerator, 0.0, wishes, first)
    if update_share is None and accelerator is not None and why_not_there(rule) is None:
        tried = [best]
        for share in likely_shares(rule, profile, accelerator):
            with suppress(BudgetError):  # its slots for state may not fit
                given = (spec, rule, profile, batch, clips, budget, base, SLOTS, accelerator, 0.0, wishes)
                tried.append(_forecast(*given, share))
        shortest = min(tried, key=lambda found: found.cost.seconds)
        best = shortest if shortest.cost.seconds < WORTH * best.cost.seconds else best
    if not best.cost.read_bytes:
        return best
    for slots in (SLOTS, *DEEPER):
        row: list[float] = []  # seconds, by what is deferred
        for defers in SHARES if clips else (0.0,):
            if (slots, defers) == (best.slots, best.defers):
                row.append(best.cost.seconds)
                continue
            try:
                given = (spec, rule, profile, batch, clips, budget, base, slots, accelerator, defers, wishes)
                found = _forecast(*given, best.update_share)
            except BudgetError:
                return best
            gain = WORTH if found.takes_from(best) else 1 + 1e-6
            if found.cost.seconds < gain * best.cost.seconds:
                best = found
            row.append(found.cost.seconds)
            if _climbs(row):
                break
    return best


def _climbs(seconds: Sequence[float]) -> bool:
    """Whether deferring more makes a step longer and longer, or much longer at once."""
    return seconds[-1] > TOO_LONG * min(seconds) or (len(seconds) > 2 and seconds[-1] > seconds[-2] > seconds[-3])


def _forecast(
    spec: ModelSpec,
    rule: Optimizer,
    profile: Profile,
    batch: Batch,
    clips: bool,
    budget: int,
    base: int,
    slots: int,
    accelerator: Accelerator | None,
    defers: float,
    wishes: Wishes,
    share: float,
) -> Forecast:
    activations = wishes.activations
    units = [_unit(unit.name, unit.tensors, rule) for unit in spec.units]
    loose = _unit("(loose)", spec.loose, rule) if spec.loose else None
    every = [*units, loose] if loose is not None else units
    going_up = spread(((s.name, s.nbytes) for unit in every for s in unit.shards), share)
    shards = [s for unit in every for s in unit.shards]
    sizes = {unit.name: unit.nbytes for unit in units}
    graphs = {unit.name: graph_nbytes(unit, batch) * batch.micro_batches for unit in spec.units}
    sums = 2 * max(sizes.values())
    at_once = int(batch.rows * batch.tokens * LOSSES * spec.logits_nbytes)
    inputs = spec.hidden_nbytes * batch.count  # of a unit, one micro-batch's
    at_once += RING if activations == "disk" else inputs * batch.micro_batches * len(units)
    at_once += max(graphs.values()) // batch.micro_batches
    there: CellPlan | None = None
    if accelerator is not None:  # which has activations and gradients in its own memory
        if going_up:
            accelerator = accelerator.updating(max(s.nbytes for s in shards))
        there = plan_there({unit.name: unit.nbytes for unit in every}, accelerator)
        sums = 0  # inputs of more than one micro-batch come down
        at_once = RING if activations == "disk" else inputs * (batch.micro_batches - 1) * len(units)
        graphs = dict.fromkeys(graphs, 0)
    rings = (min(slots, len(shards)) + (STAGES / 3)) * max(s.nbytes for s in shards)
    aside = asides(defers, is_beside=there is not None) * max(sizes.values())
    rings += aside
    free = int(budget * (1 - MARGIN)) - SLACK - base - int(rings) - sums - at_once - (loose.nbytes if loose else 0)
    plan = plan_cells(sizes, free, _bytes(wishes.weights, sum(sizes.values())))
    left = free - plan.nbytes
    deferred = deferring({u.name: sum(s.nbytes for s in u.shards) for u in units[:-1]}, defers)
    kept_graphs: set[str] = set()
    for unit in reversed(spec.units):
        need = int((1 + HOLES) * graphs[unit.name])
        fits = activations == "keep" or (activations == "auto" and need <= left)
        if there is None and unit.name in plan.kept and fits and unit.name not in deferred:
            left -= need
            kept_graphs.add(unit.name)
    if wishes.state is not None:
        left = _bytes(wishes.state, sum(s.nbytes for s in shards)) or 0
    staying, taken = evenly(shards, left)
    order = [
        replace(_placed(unit, unit.name in plan.kept, staying, there, going_up), defers=unit.name in deferred)
        for unit in units
    ]
    itemsize = 4 if spec.dtype == "float32" else 2
    copies = has_copies(clips, itemsize)
    schedule = emit_training(
        order, _placed(loose, True, staying, there, going_up) if loose else None, clips=clips, is_due=clips,
        reads="weights" if copies else "masters", writes_copies=copies, holds_there=bool(going_up),
    )  # fmt: skip
    if activations == "disk":
        schedule = with_inputs(schedule, dict.fromkeys(sizes, inputs * batch.micro_batches))
    processor = accelerator.processor if accelerator is not None else "cpu"
    each = visits(spec, profile, batch, processor)
    counts = {unit.name: sum(t.elements for t in unit.tensors) for unit in spec.units}
    backward_s = {u: v.backward_s(trains=True) + sums_s(counts[u], profile, batch, processor) for u, v in each.items()}
    for name, visit in each.items():
        if name not in kept_graphs and name != units[-1].name:
            backward_s[name] += visit.seconds
    cost = step_cost(
        schedule, profile,
        slots={"state": min(slots, len(shards)), "cells": plan.slots, "device": there.slots if there else 0,
               "stash": slots_of(inputs * batch.micro_batches), "device state": STATE_SLOTS},
        forward_s={u: v.seconds for u, v in each.items()}, backward_s=backward_s,
        update_s=update_s(rule, profile),
        crossing_s=lambda nbytes: accelerator.crossing_s(nbytes, profile) if accelerator else 0.0,
        aside_s=lambda step: updates_there_s(step, rule, profile, accelerator) if accelerator else 0.0,
        contention=accelerator.contention(profile, update_bytes_per_s(rule, profile)) if accelerator else None,
    )  # fmt: skip
    return Forecast(
        schedule=schedule,
        cost=cost,
        weights_nbytes=plan.nbytes - plan.slots * plan.slot_nbytes + (loose.nbytes if loose else 0),
        graphs_nbytes=sum(graphs[u] for u in kept_graphs),
        state_nbytes=taken,
        scratch_nbytes=plan.travels_nbytes,
        slots=slots,
        defers=defers,
        update_share=share,
        gradient_nbytes=sums,
        activation_nbytes=at_once,
        ring_nbytes=int(rings) + plan.slots * plan.slot_nbytes,
        process_nbytes=base + SLACK + int(budget * MARGIN),
        room_nbytes=_room(
            sizes, loose, shards, slots, budget + (accelerator.host_nbytes if accelerator else 0), base + aside
        ),
    )


def _bytes(wish: float | int | None, total: int) -> int | None:
    """What a user asked for, which may be a share."""
    return int(wish * total) if isinstance(wish, float) else wish


def _room(
    sizes: Mapping[str, int],
    loose: TrainedUnit | None,
    shards: Sequence[TrainedShard],
    slots: int,
    budget: int,
    base: int,
) -> int:
    """Bytes on disk that cells may take: all of theirs, if any travels in the first step."""
    rest = loose.nbytes if loose else 0
    free = budget - base - min(slots, len(shards)) * max(s.nbytes for s in shards) - rest
    try:
        first = first_cells(sizes, free, budget, STAGES * max(s.masters_nbytes for s in shards))
    except BudgetError:  # what does not fit is said by who measures
        return 0
    return sum(sizes.values()) + rest if first.travels_nbytes else 0


def evenly(shards: Sequence[TrainedShard], nbytes: int) -> tuple[set[str], int]:
    """Shards that stay in memory, as many as fit, spread evenly, and the bytes that they take."""
    total = sum(s.nbytes for s in shards)
    staying: set[str] = set()
    share, taken, wanted = min(1.0, max(0, nbytes) / max(1, total)), 0, 0.0
    for shard in shards:
        wanted += shard.nbytes * share
        if taken + shard.nbytes / 2 <= wanted and taken + shard.nbytes <= nbytes:
            staying.add(shard.name)
            taken += shard.nbytes
    return staying, taken


def _unit(name: str, tensors: tuple[TensorSpec, ...], rule: Optimizer) -> TrainedUnit:
    return cut(name, sum(t.elements for t in tensors), sum(t.nbytes for t in tensors), rule)


def cut(name: str, count: int, nbytes: int, rule: Optimizer) -> TrainedUnit:
    """A unit of so many parameters as the trainer would cut it, but for padding."""
    shards = []
    for first in range(0, count, SHARD_COUNT):
        part = min(SHARD_COUNT, count - first)
        state = page(int(rule.cost.state_bytes * part))
        shards.append(
            TrainedShard(
                name=f"{name}[{len(shards)}]", nbytes=state, masters_nbytes=min(state, page(4 * part)),
                cell_nbytes=nbytes * part // count,
            )
        )  # fmt: skip
    return TrainedUnit(name=name, nbytes=page(nbytes), shards=tuple(shards))


def _placed(
    unit: TrainedUnit, stays: bool, staying: set[str], there: CellPlan | None, going_up: Collection[str]
) -> TrainedUnit:
    shards = tuple(replace(s, stays=s.name in staying, goes_up=s.name in going_up) for s in unit.shards)
    stays_there = there is not None and unit.name in there.kept
    return replace(unit, stays=stays, shards=shards, uploads=there is not None, stays_there=stays_there)


def update_s(rule: Optimizer, profile: Profile) -> Callable[[Update], float]:
    """Seconds of a shard's update, on the CPU."""
    per_byte = rule.cost.seconds(SHARD_COUNT, profile) / max(1.0, rule.cost.state_bytes * SHARD_COUNT)
    return lambda step: per_byte * step.nbytes


def graph_nbytes(unit: UnitSpec, batch: Batch) -> int:
    """What a unit's graph keeps of one micro-batch, about: inputs and outputs of its matrices, in two bytes."""
    matrices = [t for t in unit.tensors if t.width and not t.is_table]
    widths = sum(t.width + t.elements // t.width // max(1, t.experts) * max(1, t.chosen) for t in matrices)
    return 2 * widths * batch.rows * batch.tokens
