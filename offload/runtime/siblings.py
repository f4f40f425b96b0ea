"""Linears of one module that get the same input one after the other: queries, keys and values; gate and up.

The first of them computes them all, with one hand-off to the threads, and the others find their results ready. Which
they are is learnt from the model while it runs: those that were given the very same tensor last time. A model that does
something else next time costs a product that nobody wanted, never a wrong one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch

Compute = Callable[[torch.Tensor, Sequence[int]], "list[torch.Tensor] | None"]


class Siblings:
    """The linears of one module, by number.

    Args:
        compute: takes an input and the numbers of linears; gives their results, or None when it will not.
    """

    def __init__(self, compute: Compute) -> None:
        self._compute = compute
        self._input: Callable[[], torch.Tensor | None] = lambda: None  # a weak reference: inputs may be large
        self._version = 0
        self._asked: list[int] = []  # who was given that input, in order
        self._teams: dict[int, list[int]] = {}  # the first one -> all, itself included
        self._ready: dict[int, torch.Tensor] = {}

    def take(self, number: int, x: torch.Tensor) -> torch.Tensor | None:
        """The result of linear `number` for `x`; None when it must be computed alone."""
        if x.is_inference():  # such tensors do not tell whether they were changed
            return None
        if self._input() is x and self._version == x._version:
            found = self._ready.pop(number, None)
            if found is None:
                self._asked.append(number)
            return found
        self._learn()
        self._input, self._version = weakref.ref(x), x._version
        team = self._teams.get(number)
        made = self._compute(x, team) if team is not None else None
        if team is None or made is None:
            self._asked = [number]
            return None
        self._asked = list(team)
        self._ready = dict(zip(team[1:], made[1:], strict=True))
        return made[0]

    def _learn(self) -> None:
        """The input before is done with."""
        if self._ready:  # somebody did not come
            self._teams.pop(self._asked[0], None)
            self._ready = {}
        elif len(set(self._asked)) > 1:
            self._teams[self._asked[0]] = list(dict.fromkeys(self._asked))
