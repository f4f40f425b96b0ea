"""What the lanes of training take from each other on one machine: rates, and the bytes of main memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import inf

from offload.planner.virtual import Sharing
from offload.profile import Profile

GEMM = "cpu.gemm"  # what profiles call products of many rows, as work that others disturb


@dataclass(frozen=True, kw_only=True)
class Contention:
    """Attributes:
    names: lane -> what profiles call it.
    demand: lane -> bytes of main memory a second that it takes at its own rate.
    capacity: of main memory, bytes a second.
    """

    names: Mapping[str, str]
    demand: Mapping[str, float] = field(default_factory=dict)
    capacity: float = inf

    def kept(self, profile: Profile) -> Mapping[str, Mapping[str, float]]:
        """Lane -> another -> the part of its rate that it keeps while the other runs."""
        names = self.names
        return {a: {b: min(1.0, profile.kept(names[a], names[b])) for b in names if b != a} for a in names}

    def sharing(self, profile: Profile, units: Iterable[str]) -> Sharing:
        """The same for a virtual clock whose steps concern these units."""
        demand = {(lane, unit): rate for unit in set(units) for lane, rate in self.demand.items()}
        return Sharing(keeps=self.kept(profile), demand=demand, capacity=self.capacity)


def on_cpu(profile: Profile) -> Contention:
    """Where the CPU computes."""
    return Contention(
        names={"read": "read", "write": "write", "compute": GEMM if GEMM in profile.interference else "cpu"}
    )


def beside_card(profile: Profile, update_bytes_per_s: float) -> Contention:
    """Where a card computes: copies, updates of the CPU and the disk meet in main memory.

    Args:
        update_bytes_per_s: of main memory, that updates of the CPU take.
    """
    names = {
        "read": "read", "write": "write", "upload": "h2d", "download": "d2h", "update": "cpu.adamw",
        "aside": "device", "compute": "device",
    }  # fmt: skip
    found = {lane: profile.lanes[name] for lane, name in names.items() if name in profile.lanes}
    demand = {lane: rates.bytes_per_s * rates.shares.get("dram", 0.0) for lane, rates in found.items()}
    return Contention(
        names=names, demand=demand | {"update": update_bytes_per_s}, capacity=profile.shared.get("dram", inf)
    )
