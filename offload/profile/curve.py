"""A measured curve: anchors, log-log interpolation between them, and the end anchors' own rates outside."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from math import exp, log

from offload.errors import UsageError


@dataclass(frozen=True, slots=True, order=True)
class Anchor:
    """One measurement.

    Attributes:
        x: rows, bytes or parameters, above 0.
        seconds: the median, above 0.
        spread: relative: median absolute deviation over the median; 0 when it was not measured.
    """

    x: float
    seconds: float
    spread: float = 0.0


@dataclass(frozen=True)
class Curve:
    """Seconds over an amount.

    Attributes:
        anchors: ascending in x, no two of the same; at least one.
    """

    anchors: tuple[Anchor, ...]

    def __post_init__(self) -> None:
        if not self.anchors:
            raise UsageError("a curve needs at least one anchor")
        for low, high in zip(self.anchors, self.anchors[1:], strict=False):
            if not low.x < high.x:
                raise UsageError(f"a curve's anchors must ascend, but {high.x:g} follows {low.x:g}")
        for anchor in self.anchors:
            if not (anchor.x > 0 and anchor.seconds > 0 and anchor.spread >= 0):
                raise UsageError(f"an anchor needs an amount and seconds above 0, not {anchor}")

    @classmethod
    def of(cls, points: Iterable[tuple[float, ...]]) -> Curve:
        """From (x, seconds) or (x, seconds, spread), in any order."""
        return cls(tuple(sorted(Anchor(*point) for point in points)))

    @cached_property
    def _logs(self) -> tuple[list[float], list[float], list[float]]:
        anchors = self.anchors
        return [a.x for a in anchors], [log(a.x) for a in anchors], [log(a.seconds) for a in anchors]

    def covers(self, x: float) -> bool:
        """Whether `x` lies between the first and the last anchor."""
        return self.anchors[0].x <= x <= self.anchors[-1].x

    def seconds(self, x: float) -> float:
        """At `x`: interpolated in log-log; beyond the last anchor in proportion to it, below the first as long as it.

        A smaller amount than was measured is bound by what does not depend on the amount, so it takes no less; a
        larger one goes on at the last rate.
        """
        xs, log_x, log_y = self._logs
        if x <= xs[0]:
            return self.anchors[0].seconds
        if x >= xs[-1]:
            return self.anchors[-1].seconds * x / xs[-1]
        k = bisect_left(xs, x)
        share = (log(x) - log_x[k - 1]) / (log_x[k] - log_x[k - 1])
        return exp(log_y[k - 1] + share * (log_y[k] - log_y[k - 1]))

    def spread(self, x: float) -> float:
        """The larger relative spread of the anchors around `x`."""
        k = min(bisect_left(self._logs[0], x), len(self.anchors) - 1)
        return max(self.anchors[k].spread, self.anchors[max(0, k - 1)].spread)
