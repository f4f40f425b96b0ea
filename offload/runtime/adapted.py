"""Training beside frozen weights, which may stream: they are read for the forward pass, and again for the backward one.

A frozen weight that does not stay in memory is there while its unit is visited, so what a backward pass needs of it is
computed there and then; the graph of such a unit is never kept from one pass to the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from offload.runtime.backprop import Loss
from offload.runtime.discovery import Anatomy
from offload.runtime.streams import Streams, Whereabouts
from offload.runtime.timeline import now
from offload.runtime.training import Pass, Training

ENDLESS = 1 << 63


class Adapted(Training):
    """Training of some parameters, with all others in `streams`.

    Args:
        streams: the frozen weights; closed with this. What it has read is filled, and it is not started.
        others: as for Training.
    """

    def __init__(self, root: Any, anatomy: Anatomy, *others: Any, streams: Streams, **options: Any) -> None:
        nowhere = {name: torch.empty(0) for name in streams.names}  # until they are bound
        super().__init__(root, anatomy, *others, frozen=nowhere, **options)
        self.streams = streams
        self._units = [u.name for u in anatomy.units]
        self._entered = 0.0
        streams.start(self.timeline)

    @property
    def fallbacks(self) -> Sequence[str]:
        """See Training.fallbacks."""
        return (*super().fallbacks, *self.streams.store.fallbacks)

    def run(self, losses: Sequence[Loss], scales: Sequence[float], numbers: Callable[[float], Any], step: int) -> Pass:
        """See Training.run."""
        self.streams.follow(there_and_back(self.backprop.order or self._units))
        return super().run(losses, scales, numbers, step)

    def evaluate(self, losses: Sequence[Loss], step: int) -> list[float]:
        """See Training.evaluate."""
        self.streams.follow(self.backprop.order or self._units)
        return super().evaluate(losses, step)

    def keep_graphs(self, nbytes: int) -> int:
        """See Training.keep_graphs. A graph would keep views of a slot that others get. On an accelerator none is kept:
        what is free there is not known."""
        for unit in self._units if self.device.has_memory else self.streams.travelling:
            self.backprop.parts[unit].graph_nbytes = ENDLESS
        return super().keep_graphs(nbytes)

    def enter(self, unit: str, *, is_backward: bool) -> None:
        """See Owner."""
        self.streams.enter(unit)
        super().enter(unit, is_backward=is_backward)
        self._entered = now()

    def leave(self, unit: str, *, is_backward: bool) -> None:
        """See Owner."""
        if not self.cells.layouts[unit].places:  # all others count themselves
            name = "backward" if is_backward else "forward"
            self.timeline.add("compute", f"{name} {unit}", self._entered, now())
        super().leave(unit, is_backward=is_backward)
        self.streams.leave(unit)

    def whereabouts(self) -> Whereabouts:
        """Where the frozen weights are."""
        return self.streams.whereabouts(there_and_back(self._units))

    def close(self) -> None:
        """See Training.close."""
        super().close()
        self.streams.close()  # and the device with them, which has the adapters too


def there_and_back(order: Sequence[str]) -> list[str]:
    """Visits of a forward and a backward pass: the last unit's are one."""
    return [*order, *reversed(order[:-1])]
