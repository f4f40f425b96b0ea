"""Small changes of a placement, tried one after the other: what streams is exchanged for what stays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from offload.planner.placement import Placement, Ring, Tier
from offload.specs import ModelSpec, TensorSpec

TRIES = 400
GAIN = 1e-3  # relative: less is not worth a move


def improve(
    spec: ModelSpec, placement: Placement, host_nbytes: int, seconds: Callable[[Placement], float]
) -> Placement:
    """Takes every move that makes a token faster, until none does or `TRIES` were looked at.

    Args:
        placement: without an accelerator.
        host_nbytes: what weights, loose tensors and the ring may take together.
        seconds: of a token.
    """
    best, tries = seconds(placement), 0
    moved = True
    while moved and tries < TRIES:
        moved = False
        for other in _neighbours(spec, placement, host_nbytes):
            tries += 1
            if (found := seconds(other)) < best * (1 - GAIN):
                placement, best, moved = other, found, True
                break
            if tries >= TRIES:
                break
    return placement


def whole_units(spec: ModelSpec, like: Placement, host_nbytes: int, slots: int) -> Iterator[Placement]:
    """As few units as will do stream as a whole, equally far apart: what stays between them hides their reads.

    Args:
        spec: the model.
        like: without an accelerator; says which tables stay on disk.
        host_nbytes: what weights, loose tensors and the ring may take together.
        slots: of the ring.
    """
    units = [u for u in spec.units if any(t.nbytes and t.name not in like.tables for t in u.tensors)]
    for count in range(1, len(units) + 1):
        found = False
        for first in range(-(-len(units) // count)):
            chosen = {units[(first + k * len(units) // count) % len(units)].name for k in range(count)}
            home = {
                t.name: Tier.DISK if u.name in chosen or t.name in like.tables else Tier.HOST
                for u in spec.units
                for t in u.tensors
            }
            other = _with_home(spec, like, home, slots)
            if _fits(spec, other, host_nbytes):
                found = True
                yield other
        if found:
            return


def _neighbours(spec: ModelSpec, placement: Placement, host_nbytes: int) -> Iterator[Placement]:
    """Placements that fit and differ in one tensor, two, which of two like units streams, or the ring's depth."""
    parts = {t.name: (u.name, t) for u in spec.units for t in u.tensors if not t.is_table and t.nbytes}
    streams = [name for name in parts if placement.home[name] is Tier.DISK]
    stays = [name for name in parts if placement.home[name] is Tier.HOST]
    changes: list[tuple[str, ...]] = [(name,) for name in streams]
    seen: set[tuple[object, ...]] = set()
    for out in stays:
        for back in streams:
            (unit_out, a), (unit_back, b) = parts[out], parts[back]
            # exchanges of equal sizes between the same two units change nothing
            key = (unit_out, a.nbytes, unit_back, b.nbytes)
            if key not in seen and (a.nbytes != b.nbytes or unit_out != unit_back):
                seen.add(key)
                changes.append((out, back))
    changes += _shifts(spec, placement)
    for change in changes:
        home = dict(placement.home)
        for name in change:
            home[name] = Tier.HOST if home[name] is Tier.DISK else Tier.DISK
        other = _with_home(spec, placement, home, placement.host_ring.slots)
        if _fits(spec, other, host_nbytes):
            yield other
    for slots in (placement.host_ring.slots + 1, placement.host_ring.slots - 1):
        if slots >= 1:
            other = replace(placement, host_ring=Ring(slots, placement.host_ring.slot_nbytes))
            if _fits(spec, other, host_nbytes):
                yield other


def _shifts(spec: ModelSpec, placement: Placement) -> Iterator[tuple[str, ...]]:
    """What changes its place where all that streams of a unit stays, and the same of a like unit streams instead."""
    for unit in spec.units:
        gone = {k for k, t in enumerate(unit.tensors) if t in placement.bundles.get(unit.name, ())}
        sizes = [t.nbytes for t in unit.tensors]
        for other in spec.units:
            if gone and other.name not in placement.bundles and [t.nbytes for t in other.tensors] == sizes:
                yield tuple(u.tensors[k].name for u in (unit, other) for k in sorted(gone))


def _with_home(spec: ModelSpec, placement: Placement, home: dict[str, Tier], slots: int) -> Placement:
    bundles: dict[str, tuple[TensorSpec, ...]] = {}
    for unit in spec.units:
        streams = tuple(t for t in unit.tensors if home[t.name] is Tier.DISK and t.name not in placement.tables)
        if streams:
            bundles[unit.name] = streams
    slot = max((sum(t.slot_nbytes for t in ts) for ts in bundles.values()), default=0)
    return replace(placement, home=home, bundles=bundles, host_ring=Ring(slots if bundles else 0, slot))


def _fits(spec: ModelSpec, placement: Placement, host_nbytes: int) -> bool:
    kept = sum(t.nbytes for u in spec.units for t in u.tensors if placement.home[t.name] is Tier.HOST)
    return kept + spec.loose_nbytes + placement.host_ring.nbytes <= host_nbytes
