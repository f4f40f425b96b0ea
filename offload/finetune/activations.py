"""Which units' inputs wait on disk between forward and backward: as many as make a step shortest, or as must.

Inputs that are swapped leave memory for graphs, and a unit whose graph is kept runs forward once, not twice. So
swapping more shortens computing and lengthens the disk's work; both run at once, and a step takes the longer of them:

    seconds = max(compute - forwards saved, disk + swapped bytes to and fro / rate)

One side falls and the other rises, so there is a best number of units (Fuyou and Ratel choose by the same curve).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from offload.finetune.memory import MARGIN, NEAR, SLACK
from offload.hardware import rss_bytes
from offload.io.engine import Engine, IOStatistics
from offload.runtime.backprop import Backprop
from offload.tiers.ashore import Ashore
from offload.tiers.device import Device
from offload.tiers.stash import BLOCK, BLOCKS, Stash

RING = BLOCKS * BLOCK


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitFacts:
    """What the first step showed of a unit, all micro-batches together.

    Attributes:
        swap_nbytes: of inputs that can be swapped.
        graph_nbytes: of its graph.
        forward_s: what running it forward takes.
    """

    swap_nbytes: int
    graph_nbytes: int
    forward_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFacts:
    """What the first step showed, with every input in memory and no graph.

    Attributes:
        free_nbytes: what it left of the budget; negative: it took more.
        compute_s: of computing.
        disk_s: of the disk's work, moving state.
        rate: bytes a second of the disk then; 0 when it moved nothing.
    """

    free_nbytes: int
    compute_s: float
    disk_s: float
    rate: float


def seconds(units: Sequence[UnitFacts], step: StepFacts, swapped: int) -> float:
    """Of a step that swaps the inputs of the first units, and keeps the graphs of the last as far as they fit then."""
    moved = sum(unit.swap_nbytes for unit in units[:swapped])
    left = step.free_nbytes + moved
    saved = 0.0
    for unit in reversed(units[swapped:-1]):  # the last unit's graph is there anyway
        if unit.graph_nbytes > left:
            break
        left -= unit.graph_nbytes
        saved += unit.forward_s
    if not moved:
        return max(step.compute_s - saved, step.disk_s)
    if not step.rate:
        return float("inf")
    return max(step.compute_s - saved, step.disk_s + 2 * moved / step.rate)


def units_to_swap(units: Sequence[UnitFacts], step: StepFacts) -> int:
    """How many units, from the first on, swap their inputs.

    The first ones wait longest, and what is swapped last would be wanted back at once. At least as many as it takes to
    fit; of those, the fewest that make a step shortest.
    """
    needed = 0
    left = step.free_nbytes
    while left < 0 and needed < len(units) - 1:
        left += units[needed].swap_nbytes
        needed += 1
    return min(range(needed, max(needed + 1, len(units))), key=lambda k: (seconds(units, step, k), k))


def prepare(backprop: Backprop, wish: str, budget: int, folder: Path, engine: Engine, limit: int | None = None) -> None:
    """Before the first step: says where inputs may wait, and which do so from the start.

    Args:
        wish: "disk": all of them; "auto": those for which memory runs short in the first step.
        budget: bytes for the whole process.
        limit: bytes on disk; None: as many as there are.
    """
    if wish not in ("auto", "disk"):
        return
    backprop.inputs.stash = Stash(folder, engine, limit)
    for part in backprop.parts.values():
        part.swaps = wish == "disk"
    if wish == "auto":
        backprop.inputs.is_pressed = lambda: rss_bytes() > NEAR * budget


def press(
    backprop: Backprop, device: Device, most: int, wish: str, folder: Path, engine: Engine, limit: int | None = None
) -> None:
    """On an accelerator: inputs of units stay there as long as they are no more bytes than `most`; others go ashore.

    Args:
        wish: "disk": all of them go on to disk.
        limit: bytes on disk; None: as many as there are.
    """
    if wish == "disk":
        backprop.inputs.stash = Ashore(device, Stash(folder, engine, limit))
        for part in backprop.parts.values():
            part.swaps = True
        return
    backprop.inputs.stash = Ashore(device)
    backprop.inputs.is_pressed = lambda: backprop.inputs.held_nbytes >= most


def slots_of(nbytes: int) -> int:
    """Units whose inputs, of so many bytes, the stash's ring holds: one that is read and one that is used, at least."""
    return max(2, RING // max(1, nbytes))


def plan_swaps(
    backprop: Backprop, wish: str, budget: int, peak: int, state_nbytes: int, micro_batches: int, compute_s: float,
    disk: IOStatistics,
) -> int:  # fmt: skip
    """After the first step: chooses which units swap; returns the peak as it will be.

    Args:
        wish, budget: see `prepare`.
        peak: largest resident set in the first step.
        state_nbytes: of optimizer state that is read and written in a step.
        compute_s: seconds that the first step took.
        disk: what it has done so far.
    """
    stash = backprop.inputs.stash
    if not isinstance(stash, Stash) or wish != "auto":
        return peak
    backprop.inputs.is_pressed = lambda: False
    whole = peak + stash.peak_nbytes  # what it would have been with every input in memory
    parts = [backprop.parts[unit] for unit in backprop.order]
    units = [
        UnitFacts(
            swap_nbytes=part.swap_nbytes * micro_batches,
            graph_nbytes=part.graph_nbytes * micro_batches,
            forward_s=part.forward_s * micro_batches,
        )
        for part in parts
    ]
    rate = (disk.read_bytes + disk.write_bytes) / disk.busy_s if disk.busy_s else 0.0
    step = StepFacts(
        free_nbytes=int(budget * (1 - MARGIN)) - SLACK - whole,
        compute_s=compute_s,
        disk_s=2 * state_nbytes / rate if rate else 0.0,
        rate=rate,
    )
    count = units_to_swap(units, step)
    for part in parts[:count]:
        part.swaps = True
    return whole - sum(unit.swap_nbytes for unit in units[:count]) + (RING if count else 0)
