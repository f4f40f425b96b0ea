"""What stays in memory in the first step, and what to do with memory that it left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from offload.errors import BudgetError
from offload.finetune.rehearsal import Working
from offload.hardware import rss_bytes
from offload.io.heap import trim
from offload.planner.cells import FEWEST, CellPlan, plan_cells
from offload.runtime.masters import STAGES
from offload.runtime.training import Training
from offload.runtime.training_lanes import LOOSE
from offload.tiers.cells import Cell, page
from offload.tiers.stash import Stash
from offload.units import MIB, format_bytes

MARGIN = 0.02  # of the budget: allocators do not repeat themselves to the byte
SLACK = 64 * MIB
NEAR = 0.75  # of the budget
RESERVE = 0.25  # of the budget: for activations, before they are measured
HOLES = 0.35  # of graphs: memory between their tensors that nothing fits into; 0.31 as measured with glibc 2.36
UNLIMITED = 1 << 62


@dataclass(frozen=True, slots=True)
class Spare:
    """How the rest of the budget is used.

    Attributes:
        peak_nbytes: of the step that memory was divided after, which kept nothing; with room for longer rows, where
            it was not the first.
        weights_nbytes: of cells that stay in memory.
        graphs_nbytes: of units whose graphs are kept, so that they run once and not twice.
        state_nbytes: of optimizer state that stays in memory.
        predicted_nbytes: what the peak was thought to be, before the step; None where nobody could tell.
    """

    peak_nbytes: int
    weights_nbytes: int
    graphs_nbytes: int
    state_nbytes: int
    predicted_nbytes: int | None = None


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a user insists on.

    Attributes:
        state: bytes, or a share of all, of optimizer state that stays in memory; None: as much as fits.
        activations: "keep", "recompute" or "disk" (computed again from inputs that wait on disk), or "auto": keep what
            fits.
        weights: bytes, or a share of all, of weights that stay in memory; None: as much as fits.
        disk_limit: bytes that may be taken in offload_dir; None: what is free.
    """

    state: float | int | None = None
    activations: str = "auto"
    weights: float | int | None = None
    disk_limit: int | None = None


def give_back(budget: int) -> None:
    """Gives freed memory back to the system once the process comes near its budget: for a step of other rows than the
    one before.

    Rows of other lengths leave holes in the allocator that the next step does not fit into: with SmolLM2 and rows of 60
    to 130 tokens, 1.6 GiB more after five steps. Far from the budget nothing is done, since to touch memory anew costs.
    """
    if rss_bytes() > NEAR * budget:
        trim()


def plan_first(layouts: Sequence[Cell], ring: int, budget: int, wishes: Wishes, *, travels: bool = True) -> CellPlan:
    """Which cells stay in memory in the first step, whose activations nobody knows yet: a guess on the safe side.

    Args:
        ring: bytes of the ring of optimizer state.
        budget: bytes for the whole process, which has nothing of the model yet.
        travels: not all need to stay.

    Raises:
        BudgetError: it cannot be.
    """
    base = rss_bytes()
    sizes = {cell.unit: page(cell.nbytes) for cell in layouts}
    loose = sizes.pop(LOOSE, 0)
    largest = max(sizes.values(), default=0)
    free = budget - base - ring - loose
    if not travels and sum(sizes.values()) <= free:
        return _with_loose(plan_cells(sizes, sum(sizes.values())))
    staging = STAGES * 4 * max((s.count for cell in layouts for s in cell.shards), default=0)
    most = int(wishes.weights * sum(sizes.values())) if isinstance(wishes.weights, float) else wishes.weights
    if travels:
        with suppress(BudgetError):
            return _with_loose(first_cells(sizes, free, budget, staging, most))
    total = sum(sizes.values())
    least = FEWEST * largest + 3 * largest + staging if travels else total
    what = (
        f"{FEWEST} slots and the gradients of the largest part of the model" if travels else "one copy of the weights"
    )
    raise BudgetError(
        f"cpu_memory={format_bytes(budget)} is too small for this training: the process itself takes "
        f"{format_bytes(base)}, {what} {format_bytes(least)}, parameters that several parts use {format_bytes(loose)}, "
        f"the ring of optimizer state {format_bytes(ring)}, and activations come on top. Give at least "
        f"{format_bytes(base + least + loose + ring + 256 * MIB)}"
    )


def first_cells(sizes: Mapping[str, int], free: int, budget: int, staging: int, most: int | None = None) -> CellPlan:
    """The same from numbers alone.

    Args:
        sizes: unit -> bytes of its cell.
        free: bytes that the process, the ring of state and parameters of no unit leave.
        staging: bytes of masters on their way to cells.
        most: bytes of cells that stay at most.

    Raises:
        BudgetError: not even the ring fits.
    """
    left = free - 3 * max(sizes.values(), default=0) - staging
    try:
        return plan_cells(sizes, left - int(RESERVE * budget), most)
    except BudgetError:
        return plan_cells(sizes, left, most)


def fit_first(training: Training, budget: int, working: Working, wishes: Wishes, *, travels: bool = True) -> int:
    """Before the first step, whose micro-batches are known now: keeps the cells that fit beside it. Returns its peak.

    What other units gave waits on disk as soon as memory is short for what the backward pass takes at its widest.

    Args:
        budget: bytes for the whole process.
        working: what the step takes.
        travels: not all weights need to stay.

    Raises:
        BudgetError: the step does not fit, whatever travels.
    """
    allowed = int(budget * (1 - MARGIN)) - SLACK
    stash = training.backprop.inputs.stash
    swaps = isinstance(stash, Stash) or (stash is not None and wishes.activations == "disk")
    free = allowed - rss_bytes() - working.nbytes
    if travels and wishes.weights is None:
        free += _divide(training, free)
    if isinstance(stash, Stash):
        training.backprop.inputs.is_pressed = lambda: rss_bytes() > allowed - working.at_once
    peak = allowed - free
    if peak - (working.waits if swaps else 0) > budget:
        least = int((peak - (working.waits if swaps else 0) + SLACK) / (1 - MARGIN))
        raise BudgetError(
            f"cpu_memory={format_bytes(budget)} is too small for this step: the process takes "
            f"{format_bytes(rss_bytes())} with the weights and state that must be there, the widest part of the model "
            f"{format_bytes(working.at_once)}, and what units give each other {format_bytes(working.waits)}"
            f"{', on disk' if swaps else ''}. Give at least {format_bytes(least)}, or shorter or smaller micro-batches"
        )
    return peak


def _divide(training: Training, free: int) -> int:
    """Keeps the cells that `free` more bytes have room for, or fewer where it is negative; returns what that frees."""
    cells = training.cells
    sizes = {unit: page(cell.nbytes) for unit, cell in cells.layouts.items() if unit != LOOSE}
    held = sum(n for unit, n in sizes.items() if cells.stays(unit))
    now = held + training.cell_ring_nbytes
    if held == sum(sizes.values()) and free >= 0:
        return 0
    plan = None
    staging = training.staging_nbytes
    for room in (now + free - (staging if free < 0 else 0), FEWEST * max(sizes.values()), *sorted(sizes.values())):
        try:
            plan = plan_cells(sizes, room)
            break
        except BudgetError:  # the fewest bytes that there can be, then
            continue
    if plan is None or (free >= 0 and plan.kept <= {u for u in sizes if cells.stays(u)}):
        return 0
    training.keep_cells(plan.kept, (plan.slots, plan.slot_nbytes))
    return now - plan.nbytes - (staging if plan.slots else 0)


def give_up(training: Training, wishes: Wishes) -> None:
    """Before a step of more tokens than memory was divided for: what was kept, unless somebody asked for it. No update
    is due."""
    training.keep_graphs(0)
    if wishes.state is None:
        training.drop_state()
    if wishes.activations == "auto":
        for part in training.backprop.parts.values():
            part.swaps = False
    trim()


def plan_memory(training: Training, budget: int, peak: int, wishes: Wishes, *, travels: bool = True) -> Spare:
    """Divides what is left of the budget, and tells the engine.

    Weights first: a byte of them that stays saves three or four of traffic in a step, and a byte of state two. Then
    graphs: 40 MiB of a block's activations save a forward pass of it, in which the disk moves several times as much.

    Args:
        budget: bytes for the whole process.
        peak: its largest resident set in a step that kept nothing.
        travels: not all weights need to stay.
    """
    free = int(budget * (1 - MARGIN)) - SLACK - peak
    cells = training.cells
    sizes = {unit: page(cell.nbytes) for unit, cell in cells.layouts.items() if unit != LOOSE}
    held = sum(n for unit, n in sizes.items() if cells.stays(unit))
    if travels and wishes.weights is None and (held < sum(sizes.values()) or peak > budget):
        room = held + training.cell_ring_nbytes + free
        room -= training.staging_nbytes if room < sum(sizes.values()) else 0
        try:
            plan = plan_cells(sizes, room)
            training.keep_cells(plan.kept, (plan.slots, plan.slot_nbytes))
            free = room - plan.nbytes
            held = plan.nbytes - plan.slots * plan.slot_nbytes
        except BudgetError:  # the guess was too small: all goes on as it began, and nothing more is kept
            free = 0
    free = max(0, free)
    most = {"auto": int(free / (1 + HOLES)), "keep": UNLIMITED, "recompute": 0, "disk": 0}
    graphs = training.keep_graphs(most[wishes.activations])
    left = max(0, free - int((1 + HOLES) * graphs))
    if isinstance(wishes.state, float):
        left = int(wishes.state * training.state_nbytes)
    elif wishes.state is not None:
        left = wishes.state
    return Spare(peak, held, graphs, training.keep_state(left))


def _with_loose(plan: CellPlan) -> CellPlan:
    return replace(plan, kept=plan.kept | {LOOSE})
