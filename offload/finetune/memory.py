"""What to do with memory that the first step left: compute less twice, then read and write less."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from offload.hardware import rss_bytes
from offload.runtime.training import Training
from offload.units import MIB

MARGIN = 0.02  # of the budget: allocators do not repeat themselves to the byte
SLACK = 64 * MIB
NEAR = 0.75  # of the budget
UNLIMITED = 1 << 62
ACTIVATIONS = ("auto", "keep", "recompute", "disk")


@dataclass(frozen=True, slots=True)
class Spare:
    """How the rest of the budget is used.

    Attributes:
        peak_nbytes: of the first step, which kept nothing.
        graphs_nbytes: of units whose graphs are kept, so that they run once and not twice.
        state_nbytes: of optimizer state that stays in memory.
    """

    peak_nbytes: int
    graphs_nbytes: int
    state_nbytes: int


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a user insists on.

    Attributes:
        state: bytes, or a share of all, of optimizer state that stays in memory; None: as much as fits.
        activations: "keep", "recompute" or "disk" (computed again from inputs that wait on disk), or "auto": keep what
            fits.
    """

    state: float | int | None = None
    activations: str = "auto"


def give_back(budget: int) -> None:
    """Gives freed memory back to the system once the process comes near its budget.

    Rows of other lengths leave holes in the allocator that the next step does not fit into: with SmolLM2 and rows of 60
    to 130 tokens, 1.6 GiB more after five steps. Far from the budget nothing is done, since to touch memory anew costs.
    """
    if rss_bytes() > NEAR * budget:
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
        if trim is not None:
            trim(0)


def plan_memory(training: Training, budget: int, peak: int, wishes: Wishes) -> Spare:
    """Divides what is left of the budget, and tells the engine.

    A byte of a graph saves more time than a byte of state: 40 MiB of a block's activations save a forward pass of it,
    in which the disk moves several times as much.

    Args:
        budget: bytes for the whole process.
        peak: its largest resident set in a step that kept nothing.
    """
    free = max(0, int(budget * (1 - MARGIN)) - SLACK - peak)
    graphs = training.keep_graphs({"auto": free, "keep": UNLIMITED, "recompute": 0, "disk": 0}[wishes.activations])
    left = max(0, free - graphs)
    if isinstance(wishes.state, float):
        left = int(wishes.state * training.state_nbytes)
    elif wishes.state is not None:
        left = wishes.state
    return Spare(peak, graphs, training.keep_state(left))
