"""Looks for a better placement than the first guess: other rings, judged by the virtual clock."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from offload.errors import BudgetError
from offload.planner.placement import MOST_SLOTS, Placement, place
from offload.planner.predict import Prediction, Pricer
from offload.specs import ModelSpec

DEPTHS = (2, 3, 4, 6, MOST_SLOTS)


@dataclass(frozen=True, kw_only=True)
class Room:
    """Memory for weights and rings, in bytes.

    Attributes:
        host_nbytes: of main memory.
        device_nbytes: of the accelerator, or None without one.
        host_beside, device_beside: what the rest of the run takes there.
        target: bytes of weights that should stay in main memory, when somebody forces it.
        slots: depth of the rings, when somebody forces it.
        shares: of what travels to a device, that the CPU may multiply by instead: the candidates.
    """

    host_nbytes: int
    device_nbytes: int | None = None
    host_beside: int = 0
    device_beside: int = 0
    target: int | None = None
    slots: int | None = None
    shares: tuple[float, ...] = (0.0,)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A placement, what it is called, and what it would do."""

    label: str
    placement: Placement
    prediction: Prediction


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


def placements(spec: ModelSpec, room: Room) -> Iterator[tuple[str, Placement]]:
    """The first guess, then the same with rings of other depths; those that do not fit are left out.

    Raises:
        BudgetError: not even the first guess fits.
    """
    guess = _place(spec, room, room.slots, room.shares[0])
    yield _label(guess), guess
    if not guess.bundles and not guess.host_parts:
        return
    for share in room.shares:
        for depth in DEPTHS if room.slots is None else (room.slots,):
            try:
                other = _place(spec, room, depth, share)
            except BudgetError:
                continue
            yield _label(other), other


def _place(spec: ModelSpec, room: Room, slots: int | None, share: float) -> Placement:
    return place(
        spec,
        host_nbytes=room.host_nbytes,
        device_nbytes=room.device_nbytes,
        slots=slots,
        host_target=room.target,
        cpu_share=share if room.device_nbytes is not None else 0.0,
    )


def search(pricer: Pricer, room: Room, *, serial: bool = True) -> Found:
    """The placement whose steps the virtual clock finds shortest; among equals the one that reads least.

    Args:
        pricer: the model, the workload and the machine.
        room: what there is.
        serial: look at a run without prefetching, too, for what overlapping is worth.

    Raises:
        BudgetError: nothing fits.
    """
    seen: dict[object, Candidate] = {}
    for label, placement in placements(pricer.spec, room):
        _judge(pricer, room, label, placement, seen)
    if serial and room.slots is None and next(iter(seen.values())).placement.bundles:
        with contextlib.suppress(BudgetError):
            _judge(pricer, room, "no prefetching", _place(pricer.spec, room, 1, room.shares[0]), seen)
    ranked = sorted(seen.values(), key=lambda c: (round(c.prediction.decode_s_per_token, 6), _moved(c)))
    return Found(best=ranked[0], rejected=tuple(ranked[1:]))


def _judge(pricer: Pricer, room: Room, label: str, placement: Placement, seen: dict[object, Candidate]) -> None:
    cuts = tuple(sorted(placement.first_rows.items()))
    key = (tuple(sorted(placement.home.items())), placement.host_ring, placement.device_ring, cuts)
    if key not in seen:
        prediction = pricer.predict(placement, host_beside=room.host_beside, device_beside=room.device_beside)
        seen[key] = Candidate(label=label, placement=placement, prediction=prediction)


def _moved(candidate: Candidate) -> int:
    return candidate.prediction.read_bytes_per_token + candidate.prediction.upload_bytes_per_token


def _label(placement: Placement) -> str:
    rings: Sequence[tuple[str, int]] = (("host", placement.host_ring.slots), ("device", placement.device_ring.slots))
    said = [f"{slots} {name} slots" for name, slots in rings if slots]
    apart = sum(t.nbytes for ts in placement.host_parts.values() for t in ts)
    if apart:
        travelling = sum(t.nbytes for ts in placement.bundles.values() for t in ts)
        said.append(f"{apart / (apart + travelling):.0%} of what would travel by the CPU")
    return ", ".join(said) if said else "all in memory"
