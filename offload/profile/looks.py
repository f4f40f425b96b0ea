"""What a disk's rate is, from looks at it at different times: the middle of them, recent ones first.

A disk is the machine's, not a model's: what was seen while one model was measured holds for the next. Its rate moves
within seconds, by a third and more on shared machines, so that one look says little; the median of many is robust, and
how far they lie from it is how far the next minute may.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime

from offload.profile.machine import Profile
from offload.profile.rates import Look

HALF_S = 3600.0  # a look that is so much older than the latest one weighs half
MOST = 64  # looks of one profile
LEAST = 3  # fewer tell of no spread


def together(looks: Sequence[Look]) -> tuple[float, float]:
    """(bytes per second, relative spread): the weighted median of at least one look, and of their distances from it."""
    last = max(look.at for look in looks)
    weights = [0.5 ** ((last - look.at) / HALF_S) for look in looks]
    rate = _median([look.bytes_per_s for look in looks], weights)
    spread = _median([abs(look.bytes_per_s / rate - 1) for look in looks], weights)
    return rate, spread if len(looks) >= LEAST else 0.0


def looks_of(profile: Profile) -> tuple[Look, ...]:
    """A profile's looks at its disk. Of one that has none, long work while it was measured is the only one."""
    lane = profile.lanes.get("read")
    if lane is None:
        return ()
    if lane.looks:
        return lane.looks
    try:
        return (Look(datetime.fromisoformat(profile.date).timestamp(), lane.bytes_per_s),)
    except ValueError:
        return ()


def sharing_disk(profile: Profile, others: Sequence[Profile]) -> Profile:
    """The same with the rate that all profiles of its disk tell of.

    Args:
        others: of this machine.
    """
    lane, disk = profile.lanes.get("read"), profile.versions.get("disk")
    if lane is None or disk is None:
        return profile
    found = {look for other in (profile, *others) if other.versions.get("disk") == disk for look in looks_of(other)}
    if not found:
        return profile
    rate, spread = together(sorted(found))
    return replace(profile, lanes={**profile.lanes, "read": lane.times(rate / lane.bytes_per_s, spread)})


def with_looks(profile: Profile, looks: Sequence[Look]) -> Profile:
    """The same, having seen more of its disk; the latest are kept."""
    lane = profile.lanes.get("read")
    if lane is None or not looks:
        return profile
    kept = tuple(sorted({*lane.looks, *looks})[-MOST:])
    return replace(profile, lanes={**profile.lanes, "read": replace(lane, looks=kept)})


def _median(values: Sequence[float], weights: Sequence[float]) -> float:
    """The value at which half of the weight is reached; the mean of two where it is met exactly between them."""
    ordered = sorted(zip(values, weights, strict=True))
    half, reached = sum(weights) / 2, 0.0
    for number, (value, weight) in enumerate(ordered):
        reached += weight
        if reached > half * (1 + 1e-9):
            return value
        if reached >= half * (1 - 1e-9) and number + 1 < len(ordered):
            return (value + ordered[number + 1][0]) / 2
    return ordered[-1][0]
