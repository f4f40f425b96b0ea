"""The schedule of training with inputs of units on disk: written behind each forward, read ahead of its backward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from offload.planner.schedule import Read, Release, Schedule, Step, Write
from offload.planner.training_steps import Backward, Forward


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteInputs(Write):
    """Writes what a unit was given, all micro-batches'."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadInputs(Read):
    """Brings it back; takes a slot of the stash's ring."""


def with_inputs(schedule: Schedule, nbytes: Mapping[str, int]) -> Schedule:
    """The same steps with those that move inputs among them.

    Args:
        nbytes: unit -> bytes of its inputs. The last unit's stay: its backward follows at once.
    """
    forwards = [s.unit for s in schedule if isinstance(s, Forward)]
    moves = {unit: nbytes[unit] for unit in forwards[:-1] if nbytes.get(unit)}
    made: list[Step] = []
    places: dict[int, int] = {}
    written: dict[str, int] = {}
    for step in schedule:
        after: tuple[int, ...] = ()
        size = moves.get(step.unit, 0)
        if isinstance(step, Backward) and size:
            after = (len(made),)
            made.append(
                ReadInputs(index=len(made), unit=step.unit, after=(written[step.unit],), nbytes=size, ring="stash")
            )
        places[step.index] = at = len(made)
        made.append(replace(step, index=at, after=(*(places[k] for k in step.after), *after)))
        if isinstance(step, Forward) and size:
            written[step.unit] = len(made)
            made.append(WriteInputs(index=len(made), unit=step.unit, after=(at,), nbytes=size))
        elif isinstance(step, Backward) and size:
            made.append(Release(index=len(made), unit=step.unit, after=(at,), ring="stash"))
    return tuple(replace(s, behind=tuple(places[k] for k in s.behind)) if s.behind else s for s in made)
