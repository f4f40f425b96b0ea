"""The schedule: one pass over the model as a tuple of small frozen steps.

The executor runs it, `explain` prints it, the timeline lays measured spans beside it. A pass repeats for ever; a step
of the next pass may start as soon as the steps it names and the slot it takes allow.

    Read     disk -> a slot of the host ring
    Upload   host (resident or slot) -> a slot of the device ring
    Compute  the unit's forward; its parameters are bound while it runs
    Download a slot of the device ring -> host
    Write    a slot -> disk
    Release  the slot goes back to its ring

A step of training is a tuple of the same kind: see `offload.planner.training`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from offload.planner.placement import Placement, Tier

RingName = Literal["host", "device", "state", "cells", "aside", "stash", "device state"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What every step has.

    Attributes:
        index: its place in the tuple.
        unit: the unit whose bundle it concerns.
        after: indices of steps of the same pass that must be done before it starts.
        behind: indices of steps of the pass before that must be.
    """

    index: int
    unit: str
    after: tuple[int, ...] = ()
    behind: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Read(Step):
    """Reads the part of a bundle that lives on disk; takes a slot of the host ring."""

    nbytes: int
    ring: RingName = "host"


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload(Step):
    """Copies a bundle to the accelerator; takes a slot of the device ring, or none where it has memory of its own."""

    nbytes: int
    ring: RingName | None = "device"


@dataclass(frozen=True, slots=True, kw_only=True)
class Download(Step):
    """Copies what was computed in a bundle's place on the accelerator to main memory."""

    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute(Step):
    """The model's own forward of the unit.

    Attributes:
        nbytes: what the unit's weights take.
        cpu_nbytes: those of them that the CPU multiplies by, beside an accelerator.
        is_beside: the CPU does it, in a lane of its own, while the accelerator computes.
    """

    nbytes: int
    cpu_nbytes: int = 0
    is_beside: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Aside(Compute):
    """What the accelerator does beside the model's own work there, in a stream of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Write(Step):
    """Writes a slot, or a part of one, to disk. The slot goes back when the write has ended, not when it has begun."""

    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Release(Step):
    """Gives the bundle's slot back to the ring."""

    ring: RingName


Schedule = tuple[Step, ...]
LANES: Mapping[type[Step], str] = {
    Read: "read",
    Upload: "upload",
    Download: "download",
    Write: "write",
    Aside: "aside",
    Compute: "compute",
}


def lane_of(step: Step) -> str:
    """Which lane does a step; none does a Release by itself."""
    if isinstance(step, Compute) and step.is_beside:
        return "update"
    return next((lane for kind, lane in LANES.items() if isinstance(step, kind)), "")


def emit(order: Sequence[tuple[str, int]], placement: Placement) -> Schedule:
    """The steps of one pass.

    Args:
        order: (unit name, bytes of its weights) in the order in which the model enters them.
        placement: says what travels.
    """
    steps: list[Step] = []
    uploads = placement.device_ring.slots > 0
    for unit, nbytes in order:
        bundle = placement.bundles.get(unit, ())
        from_disk = [t for t in bundle if placement.home[t.name] is Tier.DISK]
        ready: tuple[int, ...] = ()
        if from_disk:
            steps.append(Read(index=len(steps), unit=unit, nbytes=sum(t.read_nbytes for t in from_disk)))
            ready = (len(steps) - 1,)
        if bundle and uploads:
            steps.append(Upload(index=len(steps), unit=unit, after=ready, nbytes=sum(t.nbytes for t in bundle)))
            ready = (len(steps) - 1,)
            if from_disk:
                steps.append(Release(index=len(steps), unit=unit, after=ready, ring="host"))
        by_cpu = sum(t.nbytes for t in placement.host_parts.get(unit, ()))
        steps.append(Compute(index=len(steps), unit=unit, after=ready, nbytes=nbytes, cpu_nbytes=by_cpu))
        if bundle and (uploads or from_disk):
            ring: RingName = "device" if uploads else "host"
            steps.append(Release(index=len(steps), unit=unit, after=(len(steps) - 1,), ring=ring))
    return tuple(steps)


def explain(schedule: Schedule) -> str:
    """The schedule for a reader, a line per step."""
    lines = []
    for s in schedule:
        after = f"  after {', '.join(map(str, s.after))}" if s.after else ""
        after += f"  behind {', '.join(map(str, s.behind))}" if s.behind else ""
        size = f"  {s.nbytes / 1e6:9.2f} MB" if isinstance(s, Read | Upload | Download | Compute | Write) else ""
        ring = f"  {s.ring} ring" if isinstance(s, Read | Upload | Release) and s.ring else ""
        ring += f"  {what}" if (what := getattr(s, "shard", "") or getattr(s, "what", "")) else ""
        ring += "  beside" if isinstance(s, Compute) and s.is_beside else ""
        split = f"  {s.cpu_nbytes / 1e6:.2f} MB by the CPU" if isinstance(s, Compute) and s.cpu_nbytes else ""
        lines.append(f"{s.index:4d}  {type(s).__name__:10s} {s.unit:32s}{size}{ring}{after}{split}")
    return "\n".join(lines)
