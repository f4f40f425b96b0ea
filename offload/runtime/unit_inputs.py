"""What units were given, between forward and backward: left where it is, or put away and brought back in time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from offload.runtime.unit_calls import Part
from offload.tiers.ashore import Ashore
from offload.tiers.stash import Stash, Ticket, can_put


class UnitInputs:
    """Of one pass at a time.

    Attributes:
        stash: where inputs wait that are put away (`tiers/stash.py`, `tiers/ashore.py`); None: nowhere.
        held_nbytes: of inputs that have been left where they are in this pass.
        is_pressed: whether memory is so short that inputs are put away even if their units were not told to.
    """

    def __init__(self) -> None:
        self.stash: Stash | Ashore | None = None
        self.held_nbytes = 0
        self.is_pressed: Callable[[], bool] = lambda: False
        self._away: list[tuple[int, int, list[Ticket]]] = []  # unit's place, micro-batch, what waits elsewhere

    def begin(self) -> None:
        """A pass begins."""
        self.held_nbytes = 0

    def put_away(
        self, part: Part, tensors: Sequence[torch.Tensor], place: int, number: int, *, may_go: bool, measures: bool
    ) -> dict[int, Ticket]:
        """Lets a unit's inputs go, if they do; the unit's turn has begun.

        Args:
            place: of the unit in this pass's order.
            number: the micro-batch.
            may_go: whether there is a backward pass that will take them, and later than at once.
            measures: whether the part notes how much might go.

        Returns:
            Which of them have gone, and what they are taken back with.
        """
        waits = [k for k, t in enumerate(tensors) if t.requires_grad and can_put(t)]  # others are the same everywhere
        if measures:
            part.swap_nbytes = sum(tensors[k].untyped_storage().nbytes() for k in waits)
        if self.stash is None or not may_go or not (part.swaps or self.is_pressed()):
            self.held_nbytes += sum(tensors[k].untyped_storage().nbytes() for k in waits)
            return {}
        away = {k: self.stash.put(tensors[k]) for k in waits}
        self._away.append((place, number, list(away.values())))
        return away

    def bring_back(self, away: Mapping[int, Ticket], saved: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """A unit's inputs, those that were put away among those that were not; the unit's turn has begun."""
        if self.stash is None or not away:
            return list(saved)
        if self._away:  # the backward pass begins
            order = sorted(self._away, key=lambda entry: (-entry[0], entry[1]))
            self._away.clear()
            self.stash.expect([ticket for _, _, tickets in order for ticket in tickets])
        left = iter(saved)
        return [self.stash.take(away[k]) if k in away else next(left) for k in range(len(saved) + len(away))]

    def clear(self) -> None:
        """A pass has ended, or failed."""
        self._away.clear()
        if self.stash is not None:
            self.stash.clear()

    def close(self) -> None:
        """Gives the stash's memory and disk back."""
        if self.stash is not None:
            self.stash.close()
