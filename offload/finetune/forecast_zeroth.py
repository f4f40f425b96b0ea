"""What a zeroth-order step will take, before anything is loaded: its tuple, priced on a machine's profile, and that of
the passes that write weights back, as often as they come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from offload.budgets import TRANSIT
from offload.finetune.accelerator import Accelerator
from offload.finetune.choice import Choice
from offload.finetune.forecast import Forecast
from offload.finetune.pricing import Batch, move_s, visits
from offload.finetune.room import at, reserve_nbytes, step_nbytes
from offload.planner.placement import Placement, Tier
from offload.planner.schedule import Read, Schedule, Step, Upload
from offload.planner.training_cost import StepCost, mean_cost, replay_step
from offload.planner.zeroth import Both, Move, WriteBack, emit_zeroth, rhythm
from offload.profile import Profile
from offload.runtime.writeback import WriteBack as Rhythm
from offload.specs import ModelSpec

MOST = 1000  # steps between two passes that write back, of a run that nobody has counted


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """What a visit of a unit moves.

    Attributes:
        params: of weights that stay in memory.
        streamed: of those that do not, which lack what the log has since they were written.
        nbytes: of one side of all of them.
    """

    params: int
    streamed: int
    nbytes: int


def forecast_zeroth(
    spec: ModelSpec,
    stored: ModelSpec,
    placement: Placement,
    moved: Mapping[str, Moved],
    profile: Profile,
    *,
    batch: Batch,
    steps: int,
    every: int | None,
    writes: bool,
    sides_nbytes: int,
    budget: int,
    base: int,
    accelerator: Accelerator | None = None,
) -> Forecast:
    """A step on average.

    Args:
        spec: the model, for what its units compute.
        stored: the same for where its weights live.
        placement: where that is.
        moved: units in the order of the forward pass.
        steps: of the run; 0 when nobody has counted.
        every: steps between two passes that write back; None: as it pays.
        writes: there is room on disk for that.
        sides_nbytes: of both areas that weights are moved to.
        budget: bytes for the whole process.
        base: what it takes before anything of the model.
        accelerator: what computes; None: the CPU.
    """
    streamed = sum(t.read_nbytes for ts in placement.bundles.values() for t in ts)
    count = sum(unit.streamed for unit in moved.values())
    pace = Rhythm(streamed if writes else 0, every)
    pace.add_writes(profile.lane("write").seconds(streamed))

    def applied(updates: int) -> None:
        pace.add_pass(move_s(count, updates + 1, profile, spec.dtype) * updates / (updates + 1))

    most = steps or MOST
    cycle = rhythm(pace.is_due, applied, most) if count else None
    processor = accelerator.processor if accelerator is not None else "cpu"
    each = visits(spec, profile, batch, processor, learns=False)
    order = [(name, unit.nbytes) for name, unit in moved.items()]

    def step(updates: int, *, writes_back: bool = False) -> tuple[Schedule, StepCost]:
        schedule = emit_zeroth(
            order, placement, uploads=accelerator is not None, is_beside=processor == "device", writes_back=writes_back
        )

        def seconds(step: Step) -> float:
            if isinstance(step, Move):
                unit = moved[step.unit]
                stay_s = move_s(unit.params, 2, profile, spec.dtype)
                return stay_s + move_s(unit.streamed, updates + 1, profile, spec.dtype)
            if isinstance(step, Both):
                return 2 * each[step.unit].seconds if step.unit in each else 0.0
            if isinstance(step, Upload):
                assert accelerator is not None
                return accelerator.crossing_s(step.nbytes, profile)
            assert isinstance(step, Read | WriteBack), step
            return profile.lane("read" if isinstance(step, Read) else "write").seconds(step.nbytes)

        return schedule, replay_step(schedule, profile, seconds, {"host": placement.host_ring.slots})

    if cycle is None:
        schedule, cost = step((most if steps else 2) // 2 if count else 1)
    else:
        schedule, usual = step(max(1, cycle // 2))
        cost = mean_cost([(usual, cycle - 1), (step(cycle, writes_back=True)[1], 1)])
    work = sum(step_nbytes(stored, batch.count).values())
    return Forecast(
        schedule=schedule,
        cost=cost,
        choice=Choice(slots=0),
        weights_nbytes=at(stored, placement, Tier.HOST),
        graphs_nbytes=0,
        state_nbytes=0,
        activation_nbytes=work if accelerator is None else 0,
        ring_nbytes=placement.host_ring.nbytes + sides_nbytes,
        process_nbytes=base + reserve_nbytes(budget) + (TRANSIT if accelerator is not None else 0),
        there={"activations": work, "buffers": sides_nbytes} if accelerator is not None else {},
    )


def moved_by(
    used: Mapping[str, Sequence[str]], placement: Placement, counts: Mapping[str, int], nbytes: Mapping[str, int]
) -> dict[str, Moved]:
    """What each unit moves.

    Args:
        used: unit -> the parameters below it.
        counts, nbytes: of each parameter.
    """
    streams = {t.name for ts in placement.bundles.values() for t in ts}
    return {
        unit: Moved(
            params=sum(counts[n] for n in names if n not in streams),
            streamed=sum(counts[n] for n in names if n in streams),
            nbytes=sum(nbytes[n] for n in names),
        )
        for unit, names in used.items()
    }
