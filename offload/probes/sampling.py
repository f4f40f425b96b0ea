"""How a figure is taken: repeated, its median, and how far the repetitions spread around it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

Now = Callable[[], float]
Run = Callable[[], Any]
LEAST_S = 1e-9  # what a clock that stands still would make of anything


@dataclass(frozen=True, slots=True)
class Sample:
    """One figure.

    Attributes:
        seconds: the median.
        spread: the median of the distances from it, relative to it.
        count: measurements behind it.
    """

    seconds: float
    spread: float
    count: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Sample:
        middle = max(LEAST_S, median(seconds))
        return cls(middle, median(abs(s - middle) for s in seconds) / middle, len(seconds))

    def rate(self, amount: float) -> float:
        """So much a second, as a whole number: a profile keeps no fractions of bytes."""
        return float(round(max(1.0, amount / self.seconds)))

    def scaled(self, factor: float) -> Sample:
        return Sample(self.seconds * factor, self.spread, self.count)


class Allowance:
    """Seconds that a part of measuring may take, and their fair division: what one figure leaves, the others may use.

    Args:
        seconds: of the part, from now on.
        figures: how many are about to be taken. Whatever comes after them may use what is left.
    """

    def __init__(self, seconds: float, figures: int, now: Now = time.perf_counter) -> None:
        self._now, self._end, self._left = now, now() + seconds, max(1, figures)

    def next(self) -> float:
        """When the next figure should be over."""
        now = self._now()
        until = now + max(0.0, self._end - now) / self._left
        self._left = max(1, self._left - 1)
        return until

    def is_over(self, until: float) -> bool:
        return self._now() >= until


class Meter:
    """Times things by one clock.

    Args:
        rounds: measurements of a figure, at least.
        point_s: seconds after which there are no more than `rounds`; before, there are up to ten times as many.
        device: what computes; the time of a GPU is taken by its own events.
        now: seconds from some moment.
        allowance: of the part that is measured: what is over it is measured once. None: there is no end.
    """

    def __init__(
        self,
        rounds: int,
        point_s: float,
        device: str = "cpu",
        now: Now = time.perf_counter,
        allowance: Allowance | None = None,
    ) -> None:
        self.rounds, self.point_s, self.device, self.now, self.allowance = rounds, point_s, device, now, allowance

    def time(self, *runs: Run) -> Sample:
        """One of several equal pieces of work that go in turn, so that none finds its data in a cache. The first round
        is not counted: it compiles, allocates and touches.
        """
        if self.device != "cpu":
            return self._time_events(runs)
        until = self.allowance.next() if self.allowance is not None else None
        for number, run in enumerate(runs[:2]):
            if not number or not self._is_over(until):
                run()
        seconds: list[float] = []
        began, k = self.now(), 0
        while not seconds or (not self._is_over(until) and self._is_wanted(len(seconds), began, len(runs))):
            start = self.now()
            runs[k % len(runs)]()
            seconds.append(self.now() - start)
            k += 1
        return Sample.of(seconds)

    def _is_over(self, until: float | None) -> bool:
        return until is not None and self.allowance is not None and self.allowance.is_over(until)

    def _is_wanted(self, count: int, began: float, pieces: int) -> bool:
        """Another measurement, after so many."""
        if count < self.rounds:
            return True
        return count < max(10 * self.rounds, 2 * pieces) and self.now() - began < self.point_s

    def _time_events(self, runs: Sequence[Run]) -> Sample:
        """On a GPU work is queued: a round of all pieces is timed by events on its stream."""
        for run in runs:
            run()
        until = self.allowance.next() if self.allowance is not None else None
        seconds = []
        for number in range(self.rounds):
            if number and self._is_over(until):
                break
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for run in runs:
                run()
            end.record()
            end.synchronize()
            seconds.append(begin.elapsed_time(end) / 1e3 / len(runs))
        return Sample.of(seconds)
