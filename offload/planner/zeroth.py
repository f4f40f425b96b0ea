"""The schedule of a zeroth-order step: each unit's weights are moved to both sides, and both sides run forward.

Read      disk -> a slot of the host ring, as the checkpoint or the last file of weights has them
Move      updates that are due are applied, and both sides made, in two areas as large as the largest unit
Upload    both sides, where an accelerator computes: when all of the unit before has run
Both      the forwards of all micro-batches, on one side and on the other
WriteBack the weights as they are now, in a pass that writes back; the unit is left when it has ended
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from offload.planner.placement import Placement, Tier
from offload.planner.schedule import Compute, Read, Release, Schedule, Step, Upload, Write


@dataclass(frozen=True, slots=True, kw_only=True)
class Move(Compute):
    """The CPU moves a unit's weights; one kernel reads them once and writes both sides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Both(Compute):
    """The forwards of a unit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteBack(Write):
    """Writes the slot with its updates in it."""


def emit_zeroth(
    order: Sequence[tuple[str, int]],
    placement: Placement,
    *,
    uploads: bool = False,
    is_beside: bool = False,
    writes_back: bool = False,
) -> Schedule:
    """The steps of one step.

    Args:
        order: (unit, bytes of one side of its weights) in the order of the forward pass.
        placement: where weights live; what streams is in its bundles.
        uploads: an accelerator computes, whose memory has both sides.
        is_beside: and the CPU moves weights beside it.
        writes_back: the pass writes what streams back.
    """
    steps: list[Step] = []
    sent = run = written = -1  # of the unit before: its upload, its forwards, its write

    def add(step: Step) -> int:
        steps.append(step)
        return len(steps) - 1

    def there(*found: int) -> tuple[int, ...]:
        return tuple(sorted(k for k in found if k >= 0))

    for unit, nbytes in order:
        from_disk = [t for t in placement.bundles.get(unit, ()) if placement.home[t.name] is Tier.DISK]
        read = -1
        if from_disk:
            read = add(Read(index=len(steps), unit=unit, nbytes=sum(t.read_nbytes for t in from_disk)))
        moved = add(
            Move(
                index=len(steps), unit=unit, after=there(read, sent, written), nbytes=nbytes,
                is_beside=uploads and is_beside,
            )
        )  # fmt: skip
        if uploads:
            sent = add(Upload(index=len(steps), unit=unit, after=there(moved, run), nbytes=2 * nbytes, ring=None))
        run = add(Both(index=len(steps), unit=unit, after=there(sent if uploads else moved), nbytes=nbytes))
        written = -1
        if writes_back and from_disk:
            size = sum(t.nbytes for t in from_disk)
            written = add(WriteBack(index=len(steps), unit=unit, after=(moved,), nbytes=size))
        if from_disk:
            add(Release(index=len(steps), unit=unit, after=(max(run, written),), ring="host"))
    first = next(k for k, s in enumerate(steps) if isinstance(s, Move))
    steps[first] = replace(steps[first], behind=(run,))  # what moves it follows from the losses of the pass before
    return tuple(steps)


def rhythm(is_due: Callable[[int], bool], did: Callable[[int], None], most: int) -> int | None:
    """Passes from one that writes back to the next; None: there are not so many.

    Args:
        is_due: whether a pass that has to apply so many updates writes back.
        did: is told that a pass has applied so many.
        most: passes that there are.
    """
    for updates in range(1, most):
        if is_due(updates):
            return updates
        did(updates)
    return None
