"""A virtual clock: replays a schedule in no time, with stated durations, under the executor's own rules.

The rules are those of runtime/executor.py: a lane runs its steps in order; a step starts when the steps it names are
done and, if it takes a slot, when its ring has one free; a Release returns the slot of the step it follows. Reads of
one lane overlap as far as slots allow, but share the disk, so the disk serves them one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from offload.planner.schedule import Compute, Read, Release, Schedule, Step, Upload

LANES: Mapping[type[Step], str] = {Read: "read", Upload: "upload", Compute: "compute"}


@dataclass(frozen=True, slots=True)
class Event:
    """One run of a step, in virtual seconds."""

    step: Step
    number: int  # of the pass, from 0
    start: float
    end: float


def replay(
    schedule: Schedule, seconds: Callable[[Step], float], *, slots: Mapping[str, int], passes: int = 1
) -> list[Event]:
    """Runs `passes` passes and returns what ran when, in order of start.

    Args:
        schedule: one pass.
        seconds: how long a Read, Upload or Compute takes; releases take no time.
        slots: ring name -> its depth.
        passes: how often the pass repeats.
    """
    clock = dict.fromkeys(LANES.values(), 0.0)  # when each lane is free
    freed = {ring: [0.0] * depth for ring, depth in slots.items()}  # when each free slot became so
    done: dict[tuple[int, int], float] = {}
    releases: dict[int, list[Release]] = {}
    for step in schedule:
        if isinstance(step, Release):
            releases.setdefault(step.after[0], []).append(step)
    queues = {
        lane: [(step, n) for n in range(passes) for step in schedule if LANES.get(type(step)) == lane]
        for lane in LANES.values()
    }
    at = dict.fromkeys(queues, 0)
    events: list[Event] = []
    while any(at[lane] < len(queue) for lane, queue in queues.items()):
        moved = False
        for lane, queue in queues.items():
            while at[lane] < len(queue):
                step, number = queue[at[lane]]
                needs = [(index, number) for index in step.after]
                if not all(need in done for need in needs):
                    break
                start = max([clock[lane], *(done[need] for need in needs)])
                if isinstance(step, Read | Upload):
                    if not freed[step.ring]:
                        break
                    start = max(start, freed[step.ring].pop(freed[step.ring].index(min(freed[step.ring]))))
                end = start + seconds(step)
                clock[lane] = done[step.index, number] = end
                events.append(Event(step, number, start, end))
                for release in releases.get(step.index, ()):
                    freed[release.ring].append(end)
                at[lane] += 1
                moved = True
        assert moved, "a schedule that cannot go on: a ring without slots, or steps that wait for each other"
    return sorted(events, key=lambda e: (e.start, e.step.index))
