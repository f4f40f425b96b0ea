"""Whether the machine was quiet: key figures again at the end, and what other processes took meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import psutil

NEIGHBOURS = 0.05  # of the processors' time: beyond it nobody may call the machine quiet
DRIFT = 0.05
KEYS = 5


class Neighbours:
    """What other processes take of the processors from the moment that this is made."""

    def __init__(self) -> None:
        self._wall, self._all, self._own = _times()

    def share(self) -> float:
        """From 0 to 1, of all processors' time."""
        wall, busy, own = _times()
        passed = (wall - self._wall) * (psutil.cpu_count() or 1)
        return min(1.0, max(0.0, (busy - self._all - (own - self._own)) / passed)) if passed > 0 else 0.0


def _times() -> tuple[float, float, float]:
    """(wall, all processors' busy seconds, this process's)."""
    cpu, own = psutil.cpu_times(), psutil.Process().cpu_times()
    idle = cpu.idle + getattr(cpu, "iowait", 0.0)
    guest = getattr(cpu, "guest", 0.0) + getattr(cpu, "guest_nice", 0.0)  # counted in user, too
    return time.perf_counter(), sum(cpu) - idle - guest, own.user + own.system


@dataclass(frozen=True, kw_only=True)
class Repeated:
    """Key figures at the beginning and at the end.

    Attributes:
        drift: the median of their relative changes; above 0 where the end was slower.
        noise: the median of how far each pair lies apart.
    """

    drift: float
    noise: float


def repeat_keys(first: Mapping[str, float], measure: Mapping[str, Callable[[], float]]) -> Repeated:
    """Measures rates again. Both mappings have the same names; values are rates, above 0."""
    changes = [first[name] / again() - 1 for name, again in measure.items() if first.get(name)]
    if not changes:
        return Repeated(drift=0.0, noise=0.0)
    return Repeated(drift=median(changes), noise=median(abs(change) / 2 for change in changes))


def notes(neighbours: float, repeated: Repeated) -> tuple[str, ...]:
    """What a reader must know before trusting the figures."""
    found = []
    if neighbours > NEIGHBOURS:
        found.append(
            f"not quiet: other processes took {neighbours:.0%} of the processors while this was measured; measure "
            "again when they rest"
        )
    if abs(repeated.drift) > DRIFT:
        word = "slower" if repeated.drift > 0 else "faster"
        found.append(f"the machine was {abs(repeated.drift):.0%} {word} at the end than at the beginning")
    return tuple(found)
