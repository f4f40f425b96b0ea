"""What a step of full fine-tuning will take, before anything is loaded, and with what makes it shortest."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from offload.errors import BudgetError
from offload.finetune.accelerator import Accelerator
from offload.finetune.choice import SLOTS, Choice
from offload.finetune.division import Asked, divide
from offload.finetune.full_step import cost_of, schedule_of
from offload.finetune.memory import MARGIN, SLACK, Wishes
from offload.finetune.pricing import Batch
from offload.finetune.sharing import likely_shares
from offload.optim.base import Optimizer
from offload.optim.there import why_not_there
from offload.planner.schedule import Schedule
from offload.planner.training_cost import StepCost
from offload.profile import Profile
from offload.specs import ModelSpec

DEEPER = (16, 24, 32, 48, 64)  # slots, that are tried
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the state, to be written in the backward pass, that are tried
WORTH = 0.97  # of the time, to be worth more memory
TOO_LONG = 1.05  # times the shortest step of as deep a ring: deferring more will not make up for that


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Attributes:
    schedule: the step tuple.
    cost: what it takes.
    choice: what makes it shortest.
    weights_nbytes: of cells that stay in memory.
    graphs_nbytes: of graphs that are kept from forward to backward.
    state_nbytes: of optimizer state that stays in memory.
    scratch_nbytes: on disk, for cells that travel.
    room_nbytes: taken there at most: until the first step has been measured, more cells travel.
    gradient_nbytes: of sums of gradients, a unit's and the next one's.
    activation_nbytes: beside graphs that are kept: inputs of units, one graph, the loss.
    ring_nbytes: of the rings of state and of cells.
    process_nbytes: of the process, with what is set aside for allocators.
    there: bytes of the accelerator's memory by class.
    """

    schedule: Schedule
    cost: StepCost
    choice: Choice
    weights_nbytes: int
    graphs_nbytes: int
    state_nbytes: int
    scratch_nbytes: int = 0
    gradient_nbytes: int = 0
    activation_nbytes: int = 0
    ring_nbytes: int = 0
    process_nbytes: int = 0
    room_nbytes: int = 0
    there: Mapping[str, int] = field(default_factory=dict)

    @property
    def update_share(self) -> float:
        """Of the updates, that the accelerator makes."""
        return self.choice.update_share

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
            "state_slots": self.choice.slots,
            "state_in_backward": self.choice.defers,
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
        asked = Asked(
            spec=spec, rule=rule, profile=profile, batch=batch, clips=clips, budget=budget, base=base,
            accelerator=accelerator, wishes=wishes or Wishes(),
        )  # fmt: skip
        return _searched(asked, update_share)


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


def _searched(asked: Asked, update_share: float | None) -> Forecast:
    best = _forecast(asked, Choice(update_share=update_share or 0.0))
    if update_share is None:
        best = _shared(asked, best)
    if not best.cost.read_bytes:
        return best
    for slots in (SLOTS, *DEEPER):
        row: list[float] = []  # seconds, by what is deferred
        for defers in SHARES if asked.clips else (0.0,):
            choice = replace(best.choice, slots=slots, defers=defers)
            try:
                found = _forecast(asked, choice) if choice != best.choice else best
            except BudgetError:
                return best
            gain = WORTH if found.takes_from(best) else 1 + 1e-6
            if found.cost.seconds < gain * best.cost.seconds:
                best = found
            row.append(found.cost.seconds)
            if _climbs(row):
                break
    return best


def _shared(asked: Asked, alone: Forecast) -> Forecast:
    """The same with the share of updates by the accelerator that makes a step shortest, if that is worth it."""
    if asked.accelerator is None or why_not_there(asked.rule) is not None:
        return alone
    tried = [alone]
    for share in likely_shares(asked.rule, asked.profile, asked.accelerator):
        with suppress(BudgetError):  # its slots for state may not fit
            tried.append(_forecast(asked, replace(alone.choice, update_share=share)))
    shortest = min(tried, key=lambda found: found.cost.seconds)
    return shortest if shortest.cost.seconds < WORTH * alone.cost.seconds else alone


def _climbs(seconds: Sequence[float]) -> bool:
    """Whether deferring more makes a step longer and longer, or much longer at once."""
    return seconds[-1] > TOO_LONG * min(seconds) or (len(seconds) > 2 and seconds[-1] > seconds[-2] > seconds[-3])


def _forecast(asked: Asked, choice: Choice) -> Forecast:
    division = divide(asked, choice)
    schedule = schedule_of(asked, division)
    cells, ring = division.cells, division.cells.slots * division.cells.slot_nbytes
    return Forecast(
        schedule=schedule,
        cost=cost_of(schedule, asked, division),
        choice=choice,
        weights_nbytes=cells.nbytes - ring + (division.loose.nbytes if division.loose is not None else 0),
        graphs_nbytes=sum(division.graphs.values()),
        state_nbytes=division.state_nbytes,
        scratch_nbytes=cells.travels_nbytes,
        gradient_nbytes=division.gradient_nbytes,
        activation_nbytes=division.activation_nbytes,
        ring_nbytes=division.ring_nbytes + ring,
        process_nbytes=asked.base + SLACK + int(asked.budget * MARGIN),
        room_nbytes=division.room_nbytes,
        there=division.there_nbytes,
    )
