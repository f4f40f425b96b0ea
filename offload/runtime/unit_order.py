"""The order in which a model's units run: the first pass shows it, and every later one must keep to it."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

from offload.errors import ModelError
from offload.runtime.backprop import Backprop
from offload.runtime.training_walk import Walk
from offload.runtime.tuples import Tuples
from offload.tiers.cells import Cell


class UnitOrder:
    """Walks the tuple of each pass for units as they come.

    Args:
        layouts: of all cells, by unit.
        backprop: knows in which order units have run forward.
        tuples: the steps of each kind of pass, for the order that is known.
        walk: does the steps.

    Attributes:
        is_due: every cell holds a gradient.
        has_copies: the weights of every cell that does not stay are stored.
    """

    def __init__(self, layouts: Mapping[str, Cell], backprop: Backprop, tuples: Tuples, walk: Walk) -> None:
        self._layouts, self._backprop, self._tuples, self._walk = layouts, backprop, tuples, walk
        self.is_due = False
        self.has_copies = False
        self._is_seen = False
        self._has_backward = True  # of the pass that runs
        self._backward_of: set[str] = set()  # units whose backward has run in it

    def begin(self, *, forward: bool, backward: bool) -> None:
        """A pass begins."""
        self._has_backward = backward
        self._backward_of.clear()
        schedule = self._tuples.emit(self.is_due, self.has_copies, forward=forward, backward=backward)
        self._walk.begin(schedule, repeats=schedule is self._tuples.repeating())
        self._tuples.holds_there = bool(self._tuples.resting)

    def meet(self, unit: str, *, is_backward: bool) -> None:
        """The model enters a unit: it must be the one that comes next, except in the first pass, which shows the order.

        There, no update is due, so that nothing has happened to the units that were expected before this one.
        """
        if self._walk.is_before(unit, is_backward=is_backward):
            return
        seen = self._backprop.order
        if is_backward and not self._is_seen:
            self._check_all_ran()
            raise ModelError(f"the loss does not depend on what runs behind {unit}; that cannot be trained yet")
        if is_backward or self._is_seen or self.is_due:
            raise ModelError(
                "the model's units ran in another order than in the first step; that cannot be trained yet"
            )
        tuples = self._tuples
        tuples.order = [*seen, unit, *(u for u in tuples.order if u not in (*seen, unit))]
        tuples.forget()
        schedule = tuples.emit(
            False, self.has_copies, forward=True, backward=self._has_backward, holds_there=False
        )  # fmt: skip
        self._walk.begin(schedule, repeats=False, at=next(s.index for s in schedule if s.unit == unit))
        assert self._walk.is_before(unit, is_backward=False)

    def meet_again(self, unit: str) -> None:
        """The backward of a unit has run."""
        self._walk.turn(unit)
        self.meet(unit, is_backward=True)
        self._backward_of.add(unit)

    def check(self, trained: Mapping[str, nn.Parameter], loose: Collection[str]) -> None:
        """Every unit has its gradient, and no parameter has one that went past its unit.

        Args:
            trained: all parameters.
            loose: those of no unit.
        """
        self._check_all_ran()
        asleep = [u for u in self._backprop.order if u not in self._backward_of and self._layouts[u].places]
        if asleep:
            raise ModelError(f"the loss does not depend on {', '.join(asleep[:4])}; that cannot be trained yet")
        for name, parameter in trained.items():
            if parameter.grad is not None and name not in loose:
                raise ModelError(f"{name} is used outside its unit; such models cannot be trained yet")

    def finish(self) -> None:
        """The model has done its part of the pass: runs what is left of the tuple."""
        self._walk.finish()
        if self._has_backward:
            self._is_seen, self.is_due, self.has_copies = True, self._tuples.clips, self._tuples.writes_copies
        else:
            self.is_due = False

    def _check_all_ran(self) -> None:
        seen = self._backprop.order
        missing = [u for u in self._tuples.order if u not in seen and self._layouts[u].places]
        if missing:
            raise ModelError(
                f"{', '.join(missing[:4])} did not run in the first step, so there is nothing to train there"
            )
