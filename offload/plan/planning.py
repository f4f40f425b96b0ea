"""Plans a run without making it: a model in outline, a machine in numbers, what is asked, and what follows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from offload.budgets import Division, divide
from offload.errors import BudgetError
from offload.plan.classes import Classes, classes
from offload.planner.placement import Placement, Tier
from offload.planner.predict import Computer, Pricer, resident
from offload.planner.prediction import PassCost, Prediction
from offload.planner.processors import balanced_share
from offload.planner.search import DEPTHS, Found, Known, Room, search
from offload.planner.whatif import MEMORIES, RATES, Change, change_budgets, change_profile
from offload.planner.workspace import crossing_nbytes, expected_peak, passing_nbytes, used_nbytes
from offload.profile import Profile
from offload.specs import Budgets, ModelSpec, Workload
from offload.units import GIB

BATCHES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What to plan.

    Attributes:
        spec: the model.
        profile: the machine.
        budgets: memory that may be used.
        work: what is asked of the model.
        exact: torch's own ops only.
        link_bytes_per_s: pace of an emulated link.
        slots: depth of the rings, when somebody forces it.
        base_nbytes: what the process takes before any weight.
        extra_nbytes: what unpacking takes beside the workspace.
        weights: format of packed matrices.
        basis: of the model's numbers: headers or config.
        notes: what a run would miss of the model's files, a sentence each.
        packed: the model, and what unpacking takes, were its weights packed without loss where they stay; None: that
            is not to be.
    """

    spec: ModelSpec
    profile: Profile
    budgets: Budgets
    work: Workload
    exact: bool = False
    link_bytes_per_s: float | None = None
    slots: int | None = None
    base_nbytes: int = 0
    extra_nbytes: int = 0
    weights: str = "none"
    basis: str = "headers"
    notes: tuple[str, ...] = ()
    packed: tuple[ModelSpec, int] | None = None

    @property
    def computer(self) -> Computer:
        """On an emulated device the CPU computes."""
        on_device = self.budgets.gpu_memory is not None and self.link_bytes_per_s is None
        return Computer(
            profile=self.profile,
            processor="device" if on_device else "cpu",
            exact=self.exact,
            link_bytes_per_s=self.link_bytes_per_s,
        )


@dataclass(frozen=True, kw_only=True)
class Variant:
    """The same with something changed: what it is, and seconds of a token then; None where it cannot run."""

    label: str
    decode_s_per_token: float | None
    tokens_per_s: float | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will be done, and what will come of it.

    Attributes:
        ask: what was asked.
        division: where the memory goes.
        placement: where every tensor lives.
        prediction: what a run will show.
        found: the search, with what it rejected.
        asked: variants that the user named.
        buys: what more of each memory or rate would buy.
        planned_s: how long planning took.
    """

    ask: Ask
    division: Division
    placement: Placement
    prediction: Prediction
    found: Found
    asked: tuple[Variant, ...] = ()
    buys: tuple[Variant, ...] = ()
    planned_s: float = field(default=0.0, compare=False)

    def classes(self) -> Classes:
        """Bytes by class of tensor and tier."""
        ask = self.ask
        return classes(
            ask.spec,
            self.placement,
            self.division,
            ask.work,
            self.prediction.peak_rss_bytes,
            has_device=ask.budgets.gpu_memory is not None,
            is_emulated=ask.link_bytes_per_s is not None,
            extra_nbytes=ask.extra_nbytes,
        )

    def lanes(self) -> dict[str, dict[str, float]]:
        """Of each lane that works: bytes and seconds of a step at its own rate, and the part of the step it is busy.

        A lane may run ahead in the passes that were replayed, by which its mean would exceed a step.
        """
        cost = self.prediction.decode
        work = {
            "read": (cost.read_bytes, cost.bound.disk_s),
            "upload": (cost.upload_bytes, cost.bound.link_s),
            "compute": (0, cost.bound.compute_s),
        }
        return {
            lane: {"bytes": nbytes, "seconds": seconds, "busy": min(1.0, cost.busy_s.get(lane, 0.0) / cost.seconds)}
            for lane, (nbytes, seconds) in work.items()
            if seconds
        }

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        ask, found = self.ask, self.found
        return {
            "params": ask.spec.params,
            "weights_bytes": ask.spec.nbytes,
            "basis": ask.basis,
            "notes": list(ask.notes),
            "weights": ask.weights,
            "hardware": {
                "name": ask.profile.name,
                "source": ask.profile.source,
                "fingerprint": ask.profile.fingerprint,
            },
            "budgets": {"cpu_memory": ask.budgets.cpu_memory, "gpu_memory": ask.budgets.gpu_memory},
            "batch": ask.work.batch,
            "prompt_tokens": ask.work.prompt_tokens,
            "new_tokens": ask.work.total_tokens - ask.work.prompt_tokens,
            "exact": ask.exact,
            "fits": found.fits,
            "plan": found.best.label,
            "bytes": self.classes(),
            "rings": {
                "host": [self.placement.host_ring.slots, self.placement.host_ring.slot_nbytes],
                "device": [self.placement.device_ring.slots, self.placement.device_ring.slot_nbytes],
            },
            "lanes": self.lanes(),
            "predicted": predicted_of(self.prediction, ask.profile),
            "alternatives": [
                {
                    "plan": other.label,
                    "decode_s_per_token": other.decode.seconds,
                    "times_slower": other.decode.seconds / self.prediction.decode_s_per_token,
                }
                for other in found.rejected
            ],
            "what_if": [vars_of(v) for v in self.asked],
            "buys": [vars_of(v) for v in self.buys],
            "planned_s": self.planned_s,
        }


def predicted_of(prediction: Prediction, profile: Profile) -> dict[str, Any]:
    """The object `predicted`, which `plan --json` and `run --json` share, with the disk's rate that it rests on."""
    rate = profile.lanes["read"].bytes_per_s if "read" in profile.lanes else None
    return prediction.as_dict() | {"hardware": profile.name, "disk_bytes_per_s": rate}


def vars_of(variant: Variant) -> dict[str, Any]:
    return {
        "change": variant.label,
        "decode_s_per_token": variant.decode_s_per_token,
        "tokens_per_s": variant.tokens_per_s,
    }


def make(ask: Ask, changes: Sequence[Change] = (), *, explores: bool = True) -> Plan:
    """Searches, and says what else was looked at.

    Args:
        changes: variants to price beside the plan.
        explores: also price what more of each memory or rate would buy.

    Raises:
        BudgetError: it cannot fit; says which budget would do.
    """
    began = time.perf_counter()
    known: Known = {}
    division, found = _solve(ask, known, refines=True)
    best = found.best
    prediction = predict(Pricer(ask.spec, ask.work, ask.computer), best.placement, division, ask, later=best.decode)
    plan = Plan(ask=ask, division=division, placement=best.placement, prediction=prediction, found=found)
    asked = tuple(_variant(ask, change, known, best.placement) for change in changes)
    buys = tuple(_variant(ask, change, known, best.placement) for change in _steps(ask)) if explores else ()
    return replace(plan, asked=asked, buys=buys, planned_s=time.perf_counter() - began)


def best_batch(ask: Ask, batches: Sequence[int] = BATCHES) -> Ask:
    """The same with the batch that makes the most tokens per second.

    Raises:
        BudgetError: not even one sequence fits.
    """
    best: tuple[float, Ask] | None = None
    for batch in batches:
        one = replace(ask, work=replace(ask.work, batch=batch))
        try:
            rate = batch / _solve(one, {}, depths=())[1].best.decode.seconds
        except BudgetError:
            if best is None:
                raise
            break
        if best is None or rate > best[0] * 1.02:  # a larger batch must be worth its latency
            best = rate, one
    assert best is not None
    return best[1]


def _solve(ask: Ask, known: Known, *, depths: Sequence[int] = DEPTHS, refines: bool = False) -> tuple[Division, Found]:
    spec, extra, shares = ask.spec, ask.extra_nbytes, _shares(ask)
    division = divide(
        spec,
        ask.budgets,
        ask.work,
        slots=ask.slots,
        extra_nbytes=extra,
        extra_device_nbytes=extra + (passing_nbytes(spec) if any(shares) else 0),
        base_nbytes=ask.base_nbytes,
    )
    room = replace(room_of(spec, ask.budgets, division, ask.slots), shares=shares)
    return division, search(Pricer(spec, ask.work, ask.computer), room, known, depths=depths, refines=refines)


def _shares(ask: Ask) -> tuple[float, ...]:
    """What the CPU may multiply by of what would travel: around where it and the link finish together, or all of it."""
    has_link = ask.link_bytes_per_s is not None or "h2d" in ask.profile.lanes
    if ask.exact or ask.budgets.gpu_memory is None or not has_link or "cpu" not in ask.profile.processors:
        return (0.0,)
    link = ask.link_bytes_per_s or ask.profile.lane("h2d").bytes_per_s
    cpu = ask.profile.processors["cpu"]
    balanced = balanced_share(cpu.bytes_per_s * cpu.efficiency, link)
    return (0.0, *(round(balanced * part, 3) for part in (0.5, 0.75, 1.0)), 1.0)


def room_of(spec: ModelSpec, budgets: Budgets, division: Division, slots: int | None) -> Room:
    """Memory as `divide` divides it."""
    target = budgets.resident
    if isinstance(target, float):
        target = int(target * spec.nbytes)
    if target is not None and division.device_nbytes is not None:
        target = max(0, target - division.device_nbytes)
    return Room(host_nbytes=division.host_nbytes, device_nbytes=division.device_nbytes, target=target, slots=slots)


def predict(
    pricer: Pricer, placement: Placement, division: Division, ask: Ask, later: PassCost | None = None
) -> Prediction:
    """Both phases, with the memory that the process, its libraries and the run take beside weights and rings."""
    has_device, is_emulated = ask.budgets.gpu_memory is not None, pricer.computer.link_bytes_per_s is not None
    crossing = crossing_nbytes(ask.spec, placement.host_parts, ask.work)
    need = used_nbytes(division.workspace, ask.work, exact=ask.exact) + ask.extra_nbytes
    beside = need + crossing if has_device else 0
    sizes = resident(ask.spec, placement)
    weights, rings, here = sizes[Tier.HOST], placement.host_ring.nbytes, 0 if has_device else need
    if is_emulated:  # the device's memory is the process's
        weights, rings, here = weights + sizes[Tier.DEVICE], rings + placement.device_ring.nbytes, need
    peak = expected_peak(
        division.base_nbytes,
        weights,
        rings,
        here,
        passing=sizes[Tier.DEVICE] if ask.weights == "none" else sum(sizes.values()),
        on_disk=sizes[Tier.DISK],
        crossing=crossing if is_emulated else 0,
    )
    if has_device and not is_emulated:
        peak += ask.extra_nbytes
    return pricer.predict(placement, peak_rss_bytes=peak, device_beside=beside, later=later)


def _variant(ask: Ask, change: Change, known: Known, chosen: Placement) -> Variant:
    """What a change buys. With other rates the chosen plan still fits, so they give what it gives at least: which other
    plans are looked at follows from rates."""
    other = replace(ask, budgets=change_budgets(ask.budgets, change), profile=change_profile(ask.profile, change))
    if change.what == "link" and ask.link_bytes_per_s is not None:
        other = replace(other, link_bytes_per_s=ask.link_bytes_per_s * change.factor)
    try:
        seconds = _solve(other, known)[1].best.decode.seconds
        if change.what in RATES:
            seconds = min(seconds, Pricer(other.spec, other.work, other.computer).decode(chosen).seconds)
    except BudgetError:
        return Variant(label=str(change), decode_s_per_token=None, tokens_per_s=None)
    return Variant(label=str(change), decode_s_per_token=seconds, tokens_per_s=ask.work.batch / seconds)


def _steps(ask: Ask) -> list[Change]:
    """One GiB more of each memory, and twice each rate."""
    has_device = ask.budgets.gpu_memory is not None
    memories = [Change(what, add_nbytes=GIB) for what in MEMORIES if has_device or what != "gpu-memory"]
    used = {"disk", "cpu"} if not has_device else {"disk", "link", "gpu"}
    if ask.link_bytes_per_s is not None:
        used = {"disk", "link", "cpu"}
    return memories + [Change(what, 2.0) for what in RATES if what in used]
