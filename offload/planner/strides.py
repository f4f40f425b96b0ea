"""An optimizer's step that two processors share by stride: every n-th group of parameters goes to the accelerator.

While the CPU updates the n - 1 groups of a stride, the states of the n-th cross the link, are updated there and come
back (Deep Optimizer States, arXiv 2410.21316). Per step, with A for all groups on the CPU and B for all on the link,

    T(n) = A (1 - 1/n) + B / n

which two measured strides determine. The stride that balances both follows from rates.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, isfinite

from offload.errors import UsageError

STATE_NBYTES = 12  # of a parameter that crosses the link each way: float32 weight and two moments
WEIGHT_NBYTES = 2  # of a parameter that the CPU has updated: its 16-bit weight goes up


@dataclass(frozen=True, slots=True)
class StrideLaw:
    """Seconds of a step by stride.

    Attributes:
        cpu_s: a step whose groups are all updated by the CPU, in the background of the link.
        link_s: one whose groups all cross the link.
    """

    cpu_s: float
    link_s: float

    def seconds(self, stride: int) -> float:
        """Of a step with that stride, which is at least 1 (all on the accelerator)."""
        return self.cpu_s * (1 - 1 / stride) + self.link_s / stride

    @classmethod
    def through(cls, first: tuple[int, float], second: tuple[int, float]) -> StrideLaw:
        """From two measured (stride, seconds).

        Raises:
            UsageError: the strides are the same, or below 1.
        """
        (n, t), (m, s) = first, second
        if n == m or min(n, m) < 1:
            raise UsageError(f"two different strides from 1 determine the law, not {n} and {m}")
        slope = (t - s) / (1 / n - 1 / m)  # the law is a line over 1 / n
        return cls(cpu_s=t - slope / n, link_s=t - slope / n + slope)


def balanced_stride(cpu_params_per_s: float, link_bytes_per_s: float) -> int:
    """The stride with which the states of one group have crossed when the CPU is done with the others.

    The CPU needs (n - 1) / U seconds a parameter of a group; the link needs 12 / B for the states that go up and
    2 (n - 1) / B for the 16-bit weights of the others.

    Raises:
        UsageError: rates that are not above 0.
    """
    if not (cpu_params_per_s > 0 and link_bytes_per_s > 0 and isfinite(cpu_params_per_s * link_bytes_per_s)):
        raise UsageError(f"rates must be above 0, not {cpu_params_per_s} and {link_bytes_per_s}")
    window = 1 / cpu_params_per_s - WEIGHT_NBYTES / link_bytes_per_s
    if window <= 0:  # the CPU is faster than the link brings its weights up: it should have them all
        raise UsageError("the link is slower than the CPU: nothing is won by sending states across it")
    return 1 + ceil(STATE_NBYTES / link_bytes_per_s / window)
