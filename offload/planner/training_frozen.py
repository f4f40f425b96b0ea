"""The schedule of training beside frozen weights: what they read and upload, among the steps of what is trained.

    Read     disk -> a slot of the host ring, for each visit of a unit: forward, and again backward
    Upload   host (resident or slot) -> a slot of the device ring
    Release  behind the visit; the last unit's forward and backward are one

Frozen weights never change, so their reads wait for slots alone.
"""

from __future__ import annotations

from dataclasses import replace

from offload.planner.placement import Placement, Tier
from offload.planner.schedule import Read, Release, RingName, Schedule, Step, Upload
from offload.planner.training_steps import Backward, Forward


def with_frozen(schedule: Schedule, placement: Placement) -> Schedule:
    """The steps of training with those of frozen weights put among them.

    Args:
        schedule: of what is trained; see `emit_training`.
        placement: where frozen weights live, and which travel.
    """
    visits = [s.index for s in schedule if isinstance(s, Forward | Backward)]
    entered, left = _turns([schedule[at] for at in visits])
    made: list[Step] = []
    places: dict[int, int] = {}  # index of a step of the schedule -> its index among all
    ready: dict[str, int] = {}  # unit -> what brings its weights
    uploads = placement.device_ring.slots > 0
    count = 0
    for step in schedule:
        is_visit = isinstance(step, Forward | Backward)
        bundle = placement.bundles.get(step.unit, ()) if is_visit else ()
        if bundle and count in entered:
            ready.update(_bring(made, step.unit, placement, uploads))
        after = (ready[step.unit],) if bundle and step.unit in ready else ()
        places[step.index] = len(made)
        made.append(replace(step, index=len(made), after=(*(places[k] for k in step.after), *after)))
        if bundle and count in left and step.unit in ready:
            made.append(Release(index=len(made), unit=step.unit, after=(len(made) - 1,), ring=_ring(uploads)))
            del ready[step.unit]
        count += is_visit
    return tuple(replace(s, behind=tuple(places[k] for k in s.behind)) if s.behind else s for s in made)


def _turns(visits: list[Step]) -> tuple[set[int], set[int]]:
    """Which visits a unit is entered at, and which it is left at: two in a row are one."""
    units = [s.unit for s in visits]
    entered = {k for k, unit in enumerate(units) if k == 0 or units[k - 1] != unit}
    return entered, {k for k, unit in enumerate(units) if k + 1 == len(units) or units[k + 1] != unit}


def _ring(uploads: bool) -> RingName:
    return "device" if uploads else "host"


def _bring(made: list[Step], unit: str, placement: Placement, uploads: bool) -> dict[str, int]:
    """Adds the steps that bring a unit's weights; returns the last of them, by unit, where there is any."""
    bundle, ready = placement.bundles[unit], {}
    from_disk = [t for t in bundle if placement.home[t.name] is Tier.DISK]
    if from_disk:
        ready[unit] = len(made)
        made.append(Read(index=len(made), unit=unit, nbytes=sum(t.read_nbytes for t in from_disk)))
    if uploads:
        after = (ready[unit],) if from_disk else ()
        ready[unit] = len(made)
        made.append(Upload(index=len(made), unit=unit, after=after, nbytes=sum(t.nbytes for t in bundle)))
        if from_disk:
            made.append(Release(index=len(made), unit=unit, after=(ready[unit],), ring="host"))
    return ready
