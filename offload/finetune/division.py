"""How memory is divided in a step of full fine-tuning, from counts alone, as a run divides it once it has measured."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from offload.errors import BudgetError
from offload.finetune.accelerator import Accelerator, classes_there, plan_there
from offload.finetune.activations import RING
from offload.finetune.choice import Choice
from offload.finetune.memory import HOLES, MARGIN, SLACK, Wishes, first_cells
from offload.finetune.pricing import Batch
from offload.optim.base import Optimizer
from offload.planner.cells import CellPlan, plan_cells
from offload.planner.training import asides, deferring
from offload.planner.training_steps import TrainedShard, TrainedUnit
from offload.planner.update_share import spread
from offload.profile import Profile
from offload.runtime.masters import STAGES
from offload.specs import ModelSpec, TensorSpec, UnitSpec
from offload.tiers.cells import SHARD_COUNT, page

LOSSES = 0.5  # of the logits in two and in four bytes: a loss leaves them as they are, with the gradient in their place


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Whose step is foretold.

    Attributes:
        spec: the model.
        rule: the optimizer.
        profile: the machine.
        batch: of the step.
        clips: gradients are clipped.
        budget: bytes for the whole process.
        base: what it takes before anything of the model.
        accelerator: what computes, which knows what activations take there; None: the CPU.
        wishes: what a user insists on.
    """

    spec: ModelSpec
    rule: Optimizer
    profile: Profile
    batch: Batch
    clips: bool
    budget: int
    base: int
    accelerator: Accelerator | None
    wishes: Wishes

    @property
    def inputs_nbytes(self) -> int:
        """Of a unit's inputs, those of one micro-batch."""
        return self.spec.hidden_nbytes * self.batch.count

    @property
    def processor(self) -> str:
        """What computes, as profiles call it."""
        return self.accelerator.processor if self.accelerator is not None else "cpu"


@dataclass(frozen=True, kw_only=True)
class Division:
    """What is where, in bytes of main memory if nothing else is said.

    Attributes:
        units: in the order of the forward pass, told what of them stays.
        loose: parameters that belong to none of them.
        slots: of the ring of state.
        going_up: shards that the accelerator updates.
        cells: of the units' weights.
        graphs: unit -> bytes, of graphs that are kept from forward to backward.
        state_nbytes: of optimizer state that stays.
        gradient_nbytes: of sums of gradients, a unit's and the next one's.
        activation_nbytes: beside graphs that are kept: inputs of units, one graph, the loss.
        ring_nbytes: of the ring of state, with what waits aside.
        room_nbytes: on disk, for cells of the first step.
        accelerator: as asked for, with its slots for state.
        there: cells in its memory.
        there_nbytes: of that by class.
    """

    units: Sequence[TrainedUnit]
    loose: TrainedUnit | None
    slots: int
    going_up: Collection[str]
    cells: CellPlan
    graphs: Mapping[str, int]
    state_nbytes: int
    gradient_nbytes: int
    activation_nbytes: int
    ring_nbytes: int
    room_nbytes: int
    accelerator: Accelerator | None
    there: CellPlan | None
    there_nbytes: Mapping[str, int]


def divide(asked: Asked, choice: Choice) -> Division:
    """Rings and what computing takes come first, then weights, graphs and state, each as far as it fits.

    Raises:
        BudgetError: it cannot be.
    """
    spec, wishes, accelerator = asked.spec, asked.wishes, asked.accelerator
    units = [_unit(unit.name, unit.tensors, asked.rule) for unit in spec.units]
    loose = _unit("(loose)", spec.loose, asked.rule) if spec.loose else None
    every = [*units, loose] if loose is not None else units
    shards = [s for unit in every for s in unit.shards]
    shard_nbytes, sizes = max(s.nbytes for s in shards), {unit.name: unit.nbytes for unit in units}
    going_up = spread(((s.name, s.nbytes) for s in shards), choice.update_share)
    there, there_nbytes = None, dict[str, int]()
    if accelerator is not None:
        if going_up:
            accelerator = accelerator.updating(shard_nbytes)
        there = plan_there(above := {unit.name: unit.nbytes for unit in every}, accelerator)
        there_nbytes = classes_there(above, there, accelerator)
    graphs = {unit.name: graph_nbytes(unit, asked.batch) * asked.batch.micro_batches for unit in spec.units}
    sums = 2 * max(sizes.values()) if there is None else 0  # inputs of more than one micro-batch come down
    at_once = _at_once_nbytes(asked, max(graphs.values()))
    aside = asides(choice.defers, is_beside=there is not None) * max(sizes.values())
    slots, rest = min(choice.slots, len(shards)), loose.nbytes if loose is not None else 0
    rings = int((slots + STAGES / 3) * shard_nbytes + aside)
    free = int(asked.budget * (1 - MARGIN)) - SLACK - asked.base - rings - sums - at_once - rest
    cells = plan_cells(sizes, free, _bytes(wishes.weights, sum(sizes.values())))
    deferred = deferring({u.name: sum(s.nbytes for s in u.shards) for u in units[:-1]}, choice.defers)
    can_keep = cells.kept - deferred if there is None else ()
    kept, left = _kept_graphs({u: graphs[u] for u in graphs if u in can_keep}, free - cells.nbytes, wishes.activations)
    if wishes.state is not None:
        left = _bytes(wishes.state, sum(s.nbytes for s in shards)) or 0
    staying, state = evenly(shards, left)
    whole = asked.budget + (accelerator.host_nbytes if accelerator is not None else 0)
    return Division(
        units=[
            replace(_placed(unit, unit.name in cells.kept, staying, there, going_up), defers=unit.name in deferred)
            for unit in units
        ],
        loose=_placed(loose, True, staying, there, going_up) if loose is not None else None,
        slots=slots, going_up=going_up, cells=cells, graphs=kept, state_nbytes=state, gradient_nbytes=sums,
        activation_nbytes=at_once, ring_nbytes=rings,
        room_nbytes=_room(sizes, shards, whole - asked.base - aside - slots * shard_nbytes - rest, whole, rest),
        accelerator=accelerator, there=there, there_nbytes=there_nbytes,
    )  # fmt: skip


def _at_once_nbytes(asked: Asked, graph: int) -> int:
    """Of activations, beside graphs that are kept; an accelerator has them in its own memory, but for inputs of more
    than one micro-batch.

    Args:
        graph: bytes of the largest one, of all micro-batches.
    """
    batch, is_there = asked.batch, asked.accelerator is not None
    waiting = asked.inputs_nbytes * (batch.micro_batches - is_there) * len(asked.spec.units)
    found = RING if asked.wishes.activations == "disk" else waiting
    if is_there:
        return found
    return found + int(batch.rows * batch.tokens * LOSSES * asked.spec.logits_nbytes) + graph // batch.micro_batches


def _kept_graphs(graphs: Mapping[str, int], left: int, activations: str) -> tuple[dict[str, int], int]:
    """Those that are kept, the last ones first, and the memory that they leave."""
    kept: dict[str, int] = {}
    for unit, nbytes in reversed(graphs.items()):
        need = int((1 + HOLES) * nbytes)
        if activations == "keep" or (activations == "auto" and need <= left):
            left -= need
            kept[unit] = nbytes
    return kept, left


def _bytes(wish: float | int | None, total: int) -> int | None:
    """What a user asked for, which may be a share."""
    return int(wish * total) if isinstance(wish, float) else wish


def _room(sizes: Mapping[str, int], shards: Iterable[TrainedShard], free: int, budget: int, loose: int) -> int:
    """Bytes on disk that cells may take: all of theirs, if any travels in the first step."""
    try:
        first = first_cells(sizes, free, budget, STAGES * max(s.masters_nbytes for s in shards))
    except BudgetError:  # what does not fit is said by who measures
        return 0
    return sum(sizes.values()) + loose if first.travels_nbytes else 0


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


def graph_nbytes(unit: UnitSpec, batch: Batch) -> int:
    """What a unit's graph keeps of one micro-batch, about: inputs and outputs of its matrices, in two bytes."""
    matrices = [t for t in unit.tensors if t.width and not t.is_table]
    widths = sum(t.width + t.elements // t.width // max(1, t.experts) * max(1, t.chosen) for t in matrices)
    return 2 * widths * batch.rows * batch.tokens
