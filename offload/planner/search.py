"""Looks for a better placement than the first guess: other rings, judged by the virtual clock."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from offload.errors import BudgetError
from offload.planner.exact import fewest_bytes
from offload.planner.moves import improve, whole_units
from offload.planner.placement import MOST_SLOTS, Placement, Solve, place
from offload.planner.predict import Pricer
from offload.planner.prediction import PassCost
from offload.specs import ModelSpec

DEPTHS = (2, 3, 4, 6, MOST_SLOTS)
STARTS = 3  # of moves
WORTH = 0.95  # of the time by the best ring that prefetches: what one slot, which hides nothing, has to promise
FEW_TENSORS = 80  # of a model that moves may help: with more, what streams can be chosen finely without them


@dataclass(frozen=True, kw_only=True)
class Room:
    """Memory for weights and rings, in bytes.

    Attributes:
        host_nbytes: of main memory.
        device_nbytes: of the accelerator, or None without one.
        target: bytes of weights that should stay in main memory, when somebody forces it.
        slots: depth of the rings, when somebody forces it.
        shares: of what travels to a device, that the CPU may multiply by instead: the candidates.
    """

    host_nbytes: int
    device_nbytes: int | None = None
    target: int | None = None
    slots: int | None = None
    shares: tuple[float, ...] = (0.0,)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A placement, what it is called, and what a token would take."""

    label: str
    placement: Placement
    decode: PassCost


@dataclass(frozen=True, kw_only=True)
class Found:
    """The outcome of a search.

    Attributes:
        best: what to run.
        rejected: what else was looked at, best first.
    """

    best: Candidate
    rejected: tuple[Candidate, ...] = ()

    @property
    def fits(self) -> bool:
        """Nothing streams: the model needs no offloading."""
        return not self.best.placement.bundles


Known = dict[tuple[Room, int | None, float], Placement | None]
"""Placements that were made already, by what they depend on; None: it does not fit."""


def search(
    pricer: Pricer,
    room: Room,
    known: Known | None = None,
    *,
    depths: Sequence[int] = DEPTHS,
    refines: bool = True,
) -> Found:
    """The placement whose steps the virtual clock finds shortest; among equals the one that moves least.

    First what the CPU should multiply by, with rings as the first guess has them; then the depth of the rings; then,
    without an accelerator, the fewest bytes that must stream, exactly, and small moves from the best so far.

    Args:
        pricer: the model, the workload and the machine.
        room: what there is.
        known: is asked before a placement is made, and told; other rates change no placement.
        depths: of rings that are tried beside the first guess.
        refines: take the last two steps, which need a second or so.

    Raises:
        BudgetError: not even the first guess fits.
    """
    known = {} if known is None else known
    seen: dict[object, Candidate] = {}
    guess = _place(pricer.spec, room, room.slots, room.shares[0])
    known[room, room.slots, room.shares[0]] = guess
    if not guess.bundles and not guess.host_parts:
        return Found(best=_judged(pricer, guess, seen))

    def judge(slots: int | None, share: float, label: str | None = None) -> Candidate | None:
        key = (room, slots, share)
        if key not in known:
            with contextlib.suppress(BudgetError):
                known[key] = _place(pricer.spec, room, slots, share)
        placement = known.setdefault(key, None)
        return _judged(pricer, placement, seen, label) if placement is not None else None

    by_share = {share: found for share in room.shares if (found := judge(room.slots, share)) is not None}
    share = min(by_share, key=lambda s: _rank(by_share[s]))
    if room.slots is None and depths:
        for depth in depths:
            judge(depth, share)
        judge(1, share, "no prefetching")  # for what overlapping is worth
    if refines:
        _refine(pricer, room, min(seen.values(), key=_rank), seen)
    ranked = sorted(seen.values(), key=_rank)
    best = ranked[0]
    if room.slots is None and _hides_nothing(best):
        near = (c for c in ranked if not _hides_nothing(c) and c.decode.seconds * WORTH < best.decode.seconds)
        best = next(near, best)
    return Found(best=best, rejected=tuple(c for c in ranked if c is not best))


def _refine(pricer: Pricer, room: Room, best: Candidate, seen: dict[object, Candidate]) -> None:
    """Adds what an exact solver finds, few whole blocks, and small moves from the best of all."""
    if room.device_nbytes is not None or room.target is not None:
        return
    depths = sorted({best.placement.host_ring.slots, 1, 2, 3} if room.slots is None else {room.slots})
    for depth in depths:
        with contextlib.suppress(BudgetError):
            exact = _place(pricer.spec, room, depth, 0.0, fewest_bytes)
            _judged(pricer, exact, seen, f"{_label(exact)}, fewest bytes")
    if sum(len(u.tensors) for u in pricer.spec.units) > FEW_TENSORS:
        return
    for slots in depths:
        for placement in whole_units(pricer.spec, best.placement, room.host_nbytes, slots):
            _judged(pricer, placement, seen, f"{_label(placement)}, whole blocks")
    starts: dict[int, Candidate] = {}  # moves rarely cross from one depth to another, so each has a start
    for candidate in sorted(seen.values(), key=_rank):
        starts.setdefault(candidate.placement.host_ring.slots, candidate)
    for candidate in list(starts.values())[:STARTS]:
        moved = improve(pricer.spec, candidate.placement, room.host_nbytes, lambda p: pricer.decode(p).seconds)
        _judged(pricer, moved, seen, f"{_label(moved)}, moved")


def _hides_nothing(candidate: Candidate) -> bool:
    """Reading and computing take turns: whatever falters is waited for, and no prediction sees that coming."""
    return candidate.placement.host_ring.slots == 1


def _rank(candidate: Candidate) -> tuple[float, int]:
    found = candidate.decode
    return round(found.seconds, 6), found.read_bytes + found.upload_bytes


def _place(spec: ModelSpec, room: Room, slots: int | None, share: float, solve: Solve | None = None) -> Placement:
    return place(
        spec,
        host_nbytes=room.host_nbytes,
        device_nbytes=room.device_nbytes,
        slots=slots,
        host_target=room.target,
        cpu_share=share if room.device_nbytes is not None else 0.0,
        solve=solve,
    )


def _judged(pricer: Pricer, placement: Placement, seen: dict[object, Candidate], label: str | None = None) -> Candidate:
    cuts = tuple(sorted(placement.first_rows.items()))
    key = (tuple(sorted(placement.home.items())), placement.host_ring, placement.device_ring, cuts)
    if key not in seen:
        seen[key] = Candidate(label=label or _label(placement), placement=placement, decode=pricer.decode(placement))
    return seen[key]


def _label(placement: Placement) -> str:
    rings: Sequence[tuple[str, int]] = (("host", placement.host_ring.slots), ("device", placement.device_ring.slots))
    depths = " and ".join(f"{slots} {name}" for name, slots in rings if slots)
    said = [f"{depths} slots"] if depths else []
    apart = sum(t.nbytes for ts in placement.host_parts.values() for t in ts)
    if apart:
        travelling = sum(t.nbytes for ts in placement.bundles.values() for t in ts)
        said.append(f"{apart / (apart + travelling):.0%} by the CPU")
    return ", ".join(said) if said else "all in memory"
