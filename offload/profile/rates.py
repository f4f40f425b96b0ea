"""How fast bytes move: along a lane (disk, link) by size and threads, and through a processor's memory by threads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from offload.errors import UsageError
from offload.profile.curve import Anchor, Curve


@dataclass(frozen=True, slots=True, order=True)
class CopyRate:
    """One measurement of a lane.

    Attributes:
        nbytes: of one transfer, or of one block where several threads work.
        threads: transfers in flight.
        bytes_per_s: of all together, the median.
        spread: relative.
    """

    nbytes: int
    threads: int
    bytes_per_s: float
    spread: float = 0.0


@dataclass(frozen=True, slots=True, order=True)
class Look:
    """A moment's rate of a disk.

    Attributes:
        at: seconds since 1970.
        bytes_per_s: of long work.
    """

    at: float
    bytes_per_s: float


@dataclass(frozen=True)
class Lane:
    """One direction of a link or a disk.

    Attributes:
        rates: what was measured; at least one.
        sustained_bytes_per_s: what is left after long use (a disk whose cache is full); None: the best of `rates`.
        latency_s: of one transfer, before its first byte; 0 where `rates` of small sizes hold it.
        shares: shared capacity -> bytes of it that one byte of this lane takes (`{"dram": 1}`).
        looks: at long work, at different times: a disk's rate moves from one minute to the next.
    """

    rates: tuple[CopyRate, ...]
    sustained_bytes_per_s: float | None = None
    latency_s: float = 0.0
    shares: Mapping[str, float] = field(default_factory=dict)
    looks: tuple[Look, ...] = ()

    def __post_init__(self) -> None:
        if not self.rates:
            raise UsageError("a lane needs at least one rate")
        places = [(r.nbytes, r.threads) for r in self.rates]
        if len(set(places)) < len(places):
            raise UsageError("a lane has two rates for the same size and threads")

    @cached_property
    def _curve(self) -> Curve:
        """Seconds by bytes in flight. More bytes are never moved at a lower rate: they are cut as was measured best."""
        anchors: list[Anchor] = []
        best = 0.0
        for rate in sorted(self.rates, key=lambda r: (r.nbytes * r.threads, -r.bytes_per_s)):
            if rate.bytes_per_s > best:
                best, nbytes = rate.bytes_per_s, rate.nbytes * rate.threads
                if not anchors or anchors[-1].x < nbytes:
                    anchors.append(Anchor(nbytes, nbytes / best, rate.spread))
        return Curve(tuple(anchors))

    def spread(self, nbytes: float) -> float:
        """The relative spread of the measurements near that size."""
        return self._curve.spread(nbytes)

    @property
    def bytes_per_s(self) -> float:
        """The rate of long work: sustained where it is known, else the best."""
        return self.sustained_bytes_per_s or self.best

    @cached_property
    def best(self) -> float:
        return max(rate.bytes_per_s for rate in self.rates)

    def times(self, factor: float, spread: float) -> Lane:
        """The same at another rate of long work; nothing of it spreads less than that."""
        rates = tuple(
            CopyRate(r.nbytes, r.threads, max(1.0, float(round(r.bytes_per_s * factor))), max(r.spread, spread))
            for r in self.rates
        )
        return replace(self, rates=rates, sustained_bytes_per_s=max(1.0, float(round(self.bytes_per_s * factor))))

    def seconds(self, nbytes: float) -> float:
        """So many bytes, by themselves. They never go faster than the sustained rate.

        Where long work was faster than each short measurement, those fell into a slow spell: they give the curve's
        shape, and long work its height.
        """
        if nbytes <= 0:
            return 0.0
        faster = max(1.0, self.bytes_per_s / self.best)
        return self.latency_s + max(self._curve.seconds(nbytes) / faster, nbytes / self.bytes_per_s)

    def rate(self, nbytes: float) -> float:
        """Bytes per second of such lots, one after the other."""
        return nbytes / self.seconds(nbytes) if nbytes > 0 else self.bytes_per_s


@dataclass(frozen=True, slots=True, order=True)
class MemoryRate:
    """Bytes per second that so many threads read from (or copy in) a processor's memory."""

    threads: int
    bytes_per_s: float
    spread: float = 0.0
