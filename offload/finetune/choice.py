"""What is chosen for a run by the prediction of its step, so that the step is short."""

from __future__ import annotations

from dataclasses import dataclass

SLOTS = 8  # shards of state in memory: four being read, one being updated, and those being written


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Attributes:
    slots: of the ring of optimizer state, in shards.
    defers: share of the state that is written in the backward pass, see `Training.defer`.
    update_share: of the updates, that the accelerator makes.
    """

    slots: int = SLOTS
    defers: float = 0.0
    update_share: float = 0.0
