"""What a step of training adapters will take, before anything is loaded: its tuple, priced on a machine's profile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from offload.budgets import TRANSIT
from offload.finetune.accelerator import Accelerator
from offload.finetune.activations import slots_of
from offload.finetune.choice import SLOTS, Choice
from offload.finetune.division import cut, evenly, graph_nbytes
from offload.finetune.forecast import Forecast
from offload.finetune.full_step import update_s
from offload.finetune.memory import HOLES, MARGIN, SLACK
from offload.finetune.place_lora import LoraPlace
from offload.finetune.pricing import Batch, adapters, visits
from offload.finetune.room import at
from offload.optim.base import Optimizer
from offload.planner.placement import Tier
from offload.planner.training import emit_training
from offload.planner.training_cost import step_cost
from offload.planner.training_frozen import with_frozen
from offload.planner.training_stash import with_inputs
from offload.profile import Profile
from offload.specs import ModelSpec


def forecast_lora(
    spec: ModelSpec,
    place: LoraPlace,
    rule: Optimizer,
    profile: Profile,
    *,
    rank: int,
    batch: Batch,
    clips: bool,
    budget: int,
    base: int,
    accelerator: Accelerator | None = None,
    activations: str = "auto",
) -> Forecast:
    """The step that repeats.

    A frozen weight gets no gradient: of its product only the inputs' is made, half of what training it would take.

    Args:
        spec: the model, without adapters.
        place: where its weights live.
        rule: the optimizer.
        rank: of the adapters.
        budget: bytes for the whole process.
        base: what it takes before anything of the model.
        accelerator: what computes; None: the CPU.
        activations: see `finetuning.finetuning`.
    """
    placement, names = place.placement, list(place.cells)
    units = [cut(n, place.params[n], place.cells[n], rule) for n in names]
    shards = [s for unit in units for s in unit.shards]
    resident = at(place.spec, placement, Tier.HOST)
    here = sum(place.beside.values()) + (sum(place.step.values()) if accelerator is None else 0)
    rings = placement.host_ring.nbytes
    left = int(budget * (1 - MARGIN)) - SLACK - base - resident - rings - here
    graphs = {u.name: graph_nbytes(u, batch) * batch.micro_batches for u in spec.units}
    kept: set[str] = set()
    for name in reversed(names[:-1]):  # the last unit's backward follows at once
        need = int((1 + HOLES) * graphs.get(name, 0))
        fits = activations == "keep" or (activations == "auto" and need <= left)
        if accelerator is None and name not in placement.bundles and fits:
            left -= need
            kept.add(name)
    staying, state = evenly(shards, left)
    order = [
        replace(
            unit, shards=tuple(replace(s, stays=s.name in staying) for s in unit.shards),
            uploads=accelerator is not None, stays_there=True,
        )
        for unit in units
    ]  # fmt: skip
    schedule = with_frozen(emit_training(order, None, clips=clips, is_due=clips), placement)
    inputs = spec.hidden_nbytes * batch.count * batch.micro_batches
    if activations == "disk":
        schedule = with_inputs(schedule, dict.fromkeys(names, inputs))
    forward_s, backward_s = _seconds(spec, place, profile, rank, batch, kept, accelerator)
    ring, there = placement.host_ring, placement.device_ring
    cost = step_cost(
        schedule, profile,
        slots={"state": min(SLOTS, len(shards)), "host": ring.slots, "device": there.slots,
               "stash": slots_of(inputs)},
        forward_s=forward_s, backward_s=backward_s, update_s=update_s(rule, profile),
        crossing_s=lambda nbytes: accelerator.crossing_s(nbytes, profile) if accelerator else 0.0,
    )  # fmt: skip
    step = dict(place.step) if accelerator is not None else {}
    on_device = at(place.spec, placement, Tier.DEVICE)
    return Forecast(
        schedule=schedule,
        cost=cost,
        choice=Choice(),
        weights_nbytes=resident,
        graphs_nbytes=sum(graphs.get(name, 0) for name in kept),
        state_nbytes=state,
        activation_nbytes=here - sum(place.beside.values()),
        ring_nbytes=rings + sum(place.beside.values()),
        process_nbytes=base + SLACK + int(budget * MARGIN) + (TRANSIT if accelerator is not None else 0),
        there={"weights": on_device, "activations": sum(step.values()), "buffers": there.nbytes} if step else {},
    )


def _seconds(
    spec: ModelSpec,
    place: LoraPlace,
    profile: Profile,
    rank: int,
    batch: Batch,
    kept: set[str],
    accelerator: Accelerator | None,
) -> tuple[Mapping[str, float], Mapping[str, float]]:
    """Of each unit's forward and backward. Units ahead of the first adapter have nothing to do backward."""
    processor = accelerator.processor if accelerator is not None else "cpu"
    plain, names = visits(spec, profile, batch, processor), list(place.cells)
    forward_s, backward_s = {}, {}
    learns = False
    for name in names:
        there, back = adapters(place.adapted[name], rank, profile, batch, processor, spec.dtype)
        learns = learns or bool(place.adapted[name])
        if name not in plain:
            continue
        if plain[name].seen_s is not None:
            there = back = 0.0
        forward_s[name] = plain[name].seconds + there
        again = 0.0 if name in kept or name == names[-1] else forward_s[name]
        backward_s[name] = plain[name].backward_s(trains=False) + back + again if learns else 0.0
    return forward_s, backward_s
