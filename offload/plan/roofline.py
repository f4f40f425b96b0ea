"""What a run's blocks had to compute and move, and the ceilings of who computed: for the report's roofline."""

from __future__ import annotations

from typing import Any

from offload.planner.intensity import intensity
from offload.planner.ops import decode, prefill
from offload.profile import Profile
from offload.specs import ModelSpec, Workload


def roofline(spec: ModelSpec, work: Workload, profile: Profile, processor: str) -> dict[str, Any]:
    """For `run --json`.

    Args:
        processor: of the profile: who computed.

    Returns:
        flops_per_s and bytes_per_s, the ceilings; measured, whether they are; units: of each phase by name, operations
        and bytes of one forward, for units that multiply.
    """
    ceilings = profile.processors[processor]
    phases = {"prefill": prefill(work), "decode": decode(work)}
    units = []
    for unit in spec.units:
        found = {name: intensity(unit, spec, phase) for name, phase in phases.items()}
        if any(one.flops for one in found.values()):
            units.append(
                {"name": unit.name} | {name: {"flops": one.flops, "bytes": one.nbytes} for name, one in found.items()}
            )
    return {
        "processor": processor,
        "measured": profile.source == "measured",
        "flops_per_s": ceilings.flops_of(spec.dtype),
        "bytes_per_s": ceilings.bytes_per_s,
        "units": units,
    }
