"""What runs have taught about a machine's predictions: factors shrunk toward 1, and how far predictions were off.

A residual is the logarithm of measured over predicted. Of each family a run counts once. The factor is the posterior
mean of a normal prior around 0 (Efron and Morris, 1975: what few noisy runs say is moved toward what is known without
them): with n runs of mean m and variance v, exp(m * n t^2 / (n t^2 + v)), t being how far models are usually off. A run
that is far from what is believed counts as one that is less far (Huber, 1964): shared machines have slow seconds.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import exp, inf, isfinite, log, sqrt

from offload.errors import UsageError
from offload.profile.fields import Fields, number

PRIOR = 0.15  # usual deviation of an uncalibrated price, and so of what there is to learn
NOISE = 0.15  # usual deviation between two runs of the same, minutes apart
NOISE_RUNS = 4.0  # runs that this guess is worth
FAR = 0.35  # from what is believed: what is farther counts as this far
MOST_RUNS = 40.0  # older ones are forgotten beyond
BOUND = 2.0  # no factor is larger, nor smaller than its inverse
WHOLE: Mapping[str, float] = {"prefill": 0.13, "decode": 0.10}  # of whole phases: deviations before any run was seen
WHOLE_RUNS = 6.0


@dataclass(frozen=True, slots=True)
class Residual:
    """Moments of one family's residuals."""

    runs: float = 0.0
    mean: float = 0.0
    square: float = 0.0

    def with_run(self, value: float, far: float = inf) -> Residual:
        """After one more; what was before counts less once there is much of it.

        Args:
            far: from what was believed before, at most: what is farther counts as that.
        """
        believed = log(self.factor)
        value = min(believed + far, max(believed - far, value))
        kept = min(self.runs, MOST_RUNS - 1)
        runs = kept + 1
        return Residual(runs, (self.mean * kept + value) / runs, (self.square * kept + value * value) / runs)

    @property
    def factor(self) -> float:
        """What predictions of this family are multiplied by."""
        if not self.runs:
            return 1.0
        own = max(0.0, self.square - self.mean**2)
        variance = (own * self.runs + NOISE**2 * NOISE_RUNS) / (self.runs + NOISE_RUNS)
        weight = self.runs * PRIOR**2 / (self.runs * PRIOR**2 + variance)
        return min(BOUND, max(1 / BOUND, exp(self.mean * weight)))

    def deviation(self, before: float) -> float:
        """The root mean square of the residuals, with what was known before any."""
        return sqrt((self.square * self.runs + before**2 * WHOLE_RUNS) / (self.runs + WHOLE_RUNS))


@dataclass(frozen=True)
class Learned:
    """Residuals by family.

    The families: compute.few, compute.some, compute.many and compute.bulk (products of up to 4, 64, 256 and more rows,
    with all that a unit does beside) where all weights are where they are used; the same with `.streaming` or `.link`,
    for what comes on top where the disk writes to memory meanwhile, or weights lie beyond a link; read, upload; and
    prefill and decode, which are of the calibrated whole and only widen or narrow intervals. What 100 rows lose by
    reading weights, 500 do not: by the residuals of short prompts, long ones were predicted 10 to 20 % too slow.
    """

    families: Mapping[str, Residual] = field(default_factory=dict)

    def factor(self, family: str) -> float:
        return self.families[family].factor if family in self.families else 1.0

    def deviation(self, phase: str) -> float:
        """Relative, of a whole phase: prefill or decode."""
        return self.families.get(phase, Residual()).deviation(WHOLE[phase])

    def over(self, general: Learned) -> Learned:
        """These where there are any; elsewhere what is known in general."""
        return Learned({**general.families, **self.families})

    @property
    def runs(self) -> int:
        """How many runs there were, as far as they are remembered."""
        return round(max((r.runs for r in self.families.values()), default=0.0))

    def with_run(self, residuals: Mapping[str, float]) -> Learned:
        """After a run with these residuals, by family. What is no number, or is beyond belief, is left out."""
        families = dict(self.families)
        for family, value in sorted(residuals.items()):
            if isfinite(value) and abs(value) < 3:
                far = inf if family in WHOLE else FAR
                families[family] = families.get(family, Residual()).with_run(value, far)
        return Learned(families)

    def dump(self) -> str:
        """TOML: family -> [runs, mean, mean square]."""
        rows = (f"{f!r} = [{r.runs!r}, {r.mean!r}, {r.square!r}]" for f, r in sorted(self.families.items()))
        return "\n".join(["# Logarithms of measured over predicted: runs, mean, mean square", "[families]", *rows, ""])


def parse_learned(text: str) -> Learned:
    """What `Learned.dump` wrote.

    Raises:
        UsageError: it is something else.
    """
    try:
        values = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(f"not TOML: {error}") from None
    top = Fields(values, "")
    families = top.table("families")
    top.done()
    found = {}
    for family, row in families.items():
        if not isinstance(row, list) or len(row) != 3:
            raise UsageError(f"families.{family} must be [runs, mean, mean square]")
        lows = 0.0, -10.0, 0.0
        runs, mean, square = (number(v, f"families.{family}", low, 1e3) for v, low in zip(row, lows, strict=True))
        found[family] = Residual(runs, mean, square)
    return Learned(found)
