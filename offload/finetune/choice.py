"""What is chosen for a run by the prediction of its step, so that the step is short."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
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


_announced: ContextVar[Choice | None] = ContextVar("announced", default=None)


@contextmanager
def announced(choice: Choice | None) -> Iterator[None]:
    """A trainer of all parameters that is opened inside takes this choice, which a user has been told, and looks at
    nothing again; None: it chooses for itself. What `offload.finetuning` is given does not speak of rings."""
    token = _announced.set(choice)
    try:
        yield
    finally:
        _announced.reset(token)


def told() -> Choice | None:
    """The choice that was announced, if one was."""
    return _announced.get()
