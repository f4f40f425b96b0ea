"""How long a workload takes under a placement: its schedule, priced step by step and replayed on a virtual clock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, sqrt

from offload.planner.bound import Bound
from offload.planner.firsts import first_s
from offload.planner.ops import FEW, OpCosts, Phase, Sum, decode, prefill
from offload.planner.placement import Placement, Tier
from offload.planner.prediction import PassCost, Prediction, interval_of
from offload.planner.schedule import Compute, Read, Schedule, Step, Upload, emit
from offload.planner.virtual import Clock, Run, Sharing
from offload.profile import MemoryRate, Profile
from offload.specs import ModelSpec, UnitSpec, Workload
from offload.units import MIB

STEADY = 12  # passes within which a schedule settles, or nearly
IN_FLIGHT = 32 << 20  # bytes of blocks that the I/O engine keeps at the disk
ROW_BLOCK = 4096  # bytes read for a row of a table, at least


@dataclass(frozen=True, kw_only=True)
class Computer:
    """Where and how a model computes.

    Attributes:
        profile: the machine.
        processor: cpu or device: whose op tables count.
        exact: torch's own ops only.
        link_bytes_per_s: pace of an emulated link, which is no part of the machine.
        read, upload: the profile's lanes that the schedule's lanes use.
    """

    profile: Profile
    processor: str = "cpu"
    exact: bool = False
    link_bytes_per_s: float | None = None
    read: str = "read"
    upload: str = "h2d"


def order_of(spec: ModelSpec) -> list[tuple[str, int]]:
    """Units that a pass enters as a whole, with their bytes, in the order of the module tree."""
    return [(u.name, u.nbytes) for u in spec.units if not all(t.is_table for t in u.tensors)]


class Pricer:
    """Prices placements of one model on one machine; what does not depend on the placement is worked out once.

    Args:
        spec: the model.
        work: what is asked of it.
        computer: the machine.
    """

    def __init__(self, spec: ModelSpec, work: Workload, computer: Computer) -> None:
        self.spec, self.work, self.computer = spec, work, computer
        self.ops = OpCosts(computer.profile, computer.processor, computer.exact, computer.link_bytes_per_s)
        self._units: Mapping[str, UnitSpec] = {u.name: u for u in spec.units}
        self._order = order_of(spec)
        self._cache: dict[tuple[object, ...], Sum] = {}
        self._last: tuple[Placement, Schedule] | None = None

    def schedule(self, placement: Placement) -> Schedule:
        """The tuple that the executor would run."""
        if self._last is None or self._last[0] is not placement:
            self._last = placement, emit(self._order, placement)
        return self._last[1]

    def clock(self, placement: Placement, phase: Phase) -> tuple[Clock, Sum]:
        """The priced schedule of one phase, and the sum of its computing with its uncertainty."""
        profile = self.computer.profile
        schedule = self.schedule(placement)
        on_disk = placement.names(Tier.DISK)
        costs: dict[str, Sum] = {}
        family = family_of(placement, phase)
        beside = profile.learned.factor(family) if family != phase.family else 1.0
        for unit, _ in self._order:
            costs[unit] = self.compute(unit, phase, on_disk, placement.first_rows).times(beside)
        submit, sources = profile.cost("read_submit"), self._sources(placement)
        staged_s: dict[str, float] = {}  # in one slot; elsewhere the disk reads on while pieces are put together
        if placement.host_ring.slots == 1:  # the lane waits for the model and the model for the lane, in turn
            submit += 2 * profile.cost("handoff") + profile.cost("read_alone")
            for unit, tensors in placement.bundles.items():
                nbytes = sum(t.staged_nbytes for t in tensors if t.name in on_disk)
                staged_s[unit] = nbytes / MIB * profile.cost("assemble")
        reads = {s.unit: s.nbytes for s in schedule if isinstance(s, Read)}
        flying = self._flying(placement, reads, sum(costs[unit].seconds for unit in reads))
        reading, uploading = profile.learned.factor("read"), profile.learned.factor("upload")
        upload_submit = profile.cost("handoff")

        def seconds(step: Step) -> float:
            if isinstance(step, Compute):
                return costs[step.unit].seconds
            if isinstance(step, Read):
                return (
                    submit
                    + staged_s.get(step.unit, 0.0)
                    + reading
                    * sum(
                        max(self._moved_s(lane, step.nbytes * share, flying) for lane in lanes)
                        for share, lanes in sources
                    )
                )
            assert isinstance(step, Upload)
            return upload_submit + uploading * self._upload_s(step.nbytes)

        clock = Clock(
            schedule,
            seconds,
            slots={"host": placement.host_ring.slots, "device": placement.device_ring.slots},
            sharing=self._sharing(schedule, costs, phase),
            between_s=self.between_s(placement, phase),
            waking_s=profile.cost("waking") if self.computer.processor == "cpu" else 0.0,
        )
        return clock, sum((costs[s.unit] for s in schedule if isinstance(s, Compute)), Sum())

    def _flying(self, placement: Placement, reads: Mapping[str, int], compute_s: float) -> float:
        """Reads that are in flight together, on average: a slot is with the model while a unit computes, else on its
        way. A disk is faster the more it is asked for at once. What one read alone takes may have been measured: beyond
        its part of a stream."""
        if placement.host_ring.slots == 1 and self.computer.profile.cost("read_alone"):
            return inf
        alone_s = sum(self.computer.profile.lane(self.computer.read).seconds(nbytes) for nbytes in reads.values())
        return max(1.0, placement.host_ring.slots - min(1.0, compute_s / alone_s)) if alone_s else 1.0

    def _moved_s(self, lane: str, nbytes: float, flying: float) -> float:
        """Seconds of a read where so many of its kind are in flight."""
        found = self.computer.profile.lane(lane)
        together = min(flying * nbytes, max(nbytes, IN_FLIGHT))
        return min(found.seconds(nbytes), nbytes / found.rate(together)) if nbytes else 0.0

    def compute(self, unit: str, phase: Phase, on_disk: frozenset[str], first_rows: Mapping[str, int]) -> Sum:
        """A unit's forward when those of its tensors stream, and the CPU has those rows."""
        spec = self._units[unit]
        streams = frozenset(t.name for t in spec.tensors if t.name in on_disk and t.format != t.stored_format)
        cuts = tuple((t.name, first_rows[t.name]) for t in spec.tensors if t.name in first_rows)
        key = (unit, phase, streams, cuts)
        if key not in self._cache:
            factor = self.computer.profile.learned.factor(phase.family)
            self._cache[key] = self.ops.unit(spec, self.spec, phase, streams, dict(cuts)).times(factor)
        return self._cache[key]

    def between_s(self, placement: Placement, phase: Phase) -> float:
        """What the model's thread does between passes: choosing tokens, and reading the rows of its tables."""
        profile = self.computer.profile
        processor = profile.processors[self.computer.processor]
        logits = 4.0 * phase.sequences * self.spec.logits_nbytes / processor.bytes_per_s
        seconds = profile.cost("step") + logits
        if placement.tables:
            lane = profile.lane(self.computer.read)
            seconds += lane.seconds(ROW_BLOCK * phase.rows)
            if placement.host_ring.slots:  # rows go first, but behind the blocks that the disk works on already
                seconds += min(IN_FLIGHT, placement.host_ring.slot_nbytes) / lane.bytes_per_s
        return seconds

    def once_s(self, phase: Phase) -> float:
        """What computing takes in the first pass only: libraries make kernels for its rows."""
        if self.computer.processor != "cpu":
            return 0.0
        return first_s(self.spec, phase, self.ops)

    def _sources(self, placement: Placement) -> list[tuple[float, tuple[str, ...]]]:
        """What streams to main memory, as (part of it, lanes on its way): from the tiers below, each filled in turn.

        The last tier holds all the rest, whatever its capacity: that the model is there is known.
        """
        tiers = self.computer.profile.tiers
        host = next((k for k, tier in enumerate(tiers) if tier.name == "host"), len(tiers))
        total = left = sum(
            t.read_nbytes for ts in placement.bundles.values() for t in ts if placement.home[t.name] is Tier.DISK
        )
        found: list[tuple[float, tuple[str, ...]]] = []
        lanes: tuple[str, ...] = ()
        for k in range(host + 1, len(tiers)):
            lanes = (*lanes, tiers[k - 1].load or self.computer.read)
            held = left if k == len(tiers) - 1 else min(left, tiers[k].capacity_nbytes)
            if held:
                found.append((held / total, lanes))
                left -= held
        return found or [(1.0, (self.computer.read,))]

    def _upload_s(self, nbytes: float) -> float:
        if (link := self.computer.link_bytes_per_s) is not None:
            return nbytes / min(link, self._emulated_copy())
        return self.computer.profile.lane(self.computer.upload).seconds(nbytes)

    def _emulated_copy(self) -> float:
        """Bytes per second that an emulated link can copy at most: one thread does, from memory to memory."""
        processor = self.computer.profile.processors[self.computer.processor]
        return min(processor.copy, default=MemoryRate(1, inf)).bytes_per_s

    def _beside_copies(self, computing: str) -> tuple[float, float]:
        """The parts of their own rates that computing and an emulated link keep: the cores that compute also copy.

        A pair of both at full speed was measured. A paced link copies for a part of the time only, and slows computing
        down for that part; it is slower than its pace only where the copies beside computing are.
        """
        profile, copy, link = self.computer.profile, self._emulated_copy(), self.computer.link_bytes_per_s or inf
        measured = "cpu.copy" in profile.interference.get(computing, {})
        computes, copies = (
            (profile.kept(computing, "cpu.copy"), profile.kept("cpu.copy", computing)) if measured else (0.5, 0.5)
        )
        beside = copies * copy
        part = min(1.0, link / beside) if copy < inf else 0.0
        return 1 - (1 - computes) * part, min(1.0, beside / min(link, copy)) if copy < inf else 1.0

    def _sharing(self, schedule: Schedule, costs: Mapping[str, Sum], phase: Phase) -> Sharing:
        """What was measured of pairs; the shared memory's capacity only where no pair was.

        Products of many rows compute more than they read: a profile may hold them apart (cpu.gemm).
        """
        profile, computer = self.computer.profile, self.computer
        names = {"read": computer.read, "upload": computer.upload, "compute": computer.processor}
        if phase.rows > FEW and f"{computer.processor}.gemm" in profile.interference:
            names["compute"] = f"{computer.processor}.gemm"
        keeps = {a: {b: min(1.0, profile.kept(names[a], names[b])) for b in names if b != a} for a in names}
        if computer.link_bytes_per_s is not None:
            keeps["compute"]["upload"], keeps["upload"]["compute"] = self._beside_copies(names["compute"])
        measured = any(names["compute"] in profile.interference.get(names[a], {}) for a in ("read", "upload"))
        capacity = profile.shared.get("dram", inf)
        if measured or capacity == inf:
            return Sharing(keeps=keeps)
        demand: dict[tuple[str, str], float] = {}
        share = profile.processors[computer.processor].shares.get("dram", 0.0)
        for step in schedule:
            if isinstance(step, Compute) and share and (took := costs[step.unit].seconds):
                demand["compute", step.unit] = share * step.nbytes / took
            elif isinstance(step, Read):
                lane = profile.lane(computer.read)
                demand["read", step.unit] = lane.shares.get("dram", 0.0) * lane.bytes_per_s
            elif isinstance(step, Upload) and computer.link_bytes_per_s is None:
                lane = profile.lane(computer.upload)
                demand["upload", step.unit] = lane.shares.get("dram", 0.0) * lane.bytes_per_s
        return Sharing(keeps=keeps, demand=demand, capacity=capacity)

    def pass_cost(self, placement: Placement, phase: Phase, *, is_first: bool = False) -> PassCost:
        """One phase: the first pass after loading, with full rings, or one of many in the steady state."""
        clock, computing = self.clock(placement, phase)
        run = clock.run(1 if is_first else STEADY, head_start=True, stop_when_steady=not is_first)
        once = self.once_s(phase) if is_first else 0.0
        seconds = _steady(run)
        if is_first:
            seconds += self.computer.profile.cost("start") + self.between_s(placement, phase) + once
        steps = self.schedule(placement)
        read_bytes = sum(s.nbytes for s in steps if isinstance(s, Read))
        upload_bytes = sum(s.nbytes for s in steps if isinstance(s, Upload))
        bound = Bound(
            disk_s=clock.work_s("read"),
            link_s=clock.work_s("upload"),
            compute_s=clock.work_s("compute"),
        )
        spread = self.computer.profile.noise
        lane = self.computer.profile.lane(self.computer.read)
        if bound.binding == "disk":
            spread = max(spread, lane.spread(lane.rates[-1].nbytes * lane.rates[-1].threads))
        own = computing.spread_s / computing.seconds if computing.seconds else 0.0
        if bound.binding == "compute":
            spread = sqrt(spread**2 + own**2)
        return PassCost(
            seconds=seconds,
            bound=bound,
            stall_s=run.stall_s / max(1, len(run.pass_s)),
            serial_s=clock.serial_s,
            spread_s=spread * seconds,
            estimated=computing.estimated_s / computing.seconds if computing.seconds else 0.0,
            read_bytes=read_bytes,
            upload_bytes=upload_bytes,
            once_s=once,
            busy_s={lane: busy / max(1, len(run.pass_s)) for lane, busy in run.busy_s.items()},
        )

    def decode(self, placement: Placement) -> PassCost:
        """A pass that makes a token, in the steady state."""
        return self.pass_cost(placement, decode(self.work))

    def predict(
        self, placement: Placement, *, peak_rss_bytes: int = 0, device_beside: int = 0, later: PassCost | None = None
    ) -> Prediction:
        """Both phases.

        Args:
            peak_rss_bytes: of the process, with its weights; see `workspace.expected_peak`.
            device_beside: bytes of the device's memory that are in use beside weights and rings.
            later: what `decode` gave, where it was asked already.
        """
        first = self.pass_cost(placement, prefill(self.work), is_first=True)
        later = later or self.decode(placement)
        profile = self.computer.profile
        sizes = resident(self.spec, placement)
        is_measured = profile.source == "measured" and max(first.estimated, later.estimated) < 0.2
        seconds = later.seconds
        known = profile.learned
        has_device = placement.device_ring.slots > 0 or sizes[Tier.DEVICE] > 0
        return Prediction(
            prefill_s=first.seconds,
            decode_s_per_token=seconds,
            tokens_per_s=self.work.batch / seconds,
            peak_rss_bytes=peak_rss_bytes,
            device_peak_bytes=device_beside + sizes[Tier.DEVICE] + placement.device_ring.nbytes if has_device else 0,
            read_bytes_per_token=later.read_bytes,
            upload_bytes_per_token=later.upload_bytes,
            bound_s_per_token=later.bound.seconds,
            binding=later.bound.binding,
            interval=interval_of(later, known.deviation("decode"), is_measured),
            prefill_interval=interval_of(first, known.deviation("prefill"), is_measured),
            origin="measured" if is_measured else "estimate",
            calibrated_runs=known.runs,
            prefill=first,
            decode=later,
        )


def family_of(placement: Placement, phase: Phase) -> str:
    """Of the residuals that computing a phase leaves; those of ops where something arrives meanwhile stand apart."""
    if placement.device_ring.slots or placement.host_parts:
        return f"{phase.family}.link"
    return f"{phase.family}.streaming" if placement.host_ring.slots else phase.family


def resident(spec: ModelSpec, placement: Placement) -> dict[Tier, int]:
    """Bytes of weights that live on each tier."""
    sizes = dict.fromkeys(Tier, 0)
    for tensor in (*spec.loose, *(t for u in spec.units for t in u.tensors)):
        if tensor.name not in placement.first_rows:
            sizes[placement.home[tensor.name]] += tensor.nbytes
    travelling = (t for ts in placement.bundles.values() for t in ts if t.name in placement.first_rows)
    for part in (*travelling, *(t for ts in placement.host_parts.values() for t in ts)):
        sizes[placement.home[part.name]] += part.nbytes
    return sizes


def _steady(run: Run) -> float:
    """Seconds of a pass in the long run: the last one where the state repeats, else the mean of the later half."""
    if run.is_steady or len(run.pass_s) < 4:
        return run.pass_s[-1]
    half = run.pass_s[len(run.pass_s) // 2 :]
    return sum(half) / len(half)
