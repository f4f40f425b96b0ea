"""The virtual clock: closed forms, bounds, sharing, and the order of the real executor. Numbers only."""

from __future__ import annotations

import threading
from concurrent.futures import Future

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from patience import HANGS_S

from offload.io.buffers import BufferPool, Lease
from offload.planner.placement import NO_RING, Placement, Ring, Tier
from offload.planner.schedule import Compute, Read, Release, Schedule, Step, Upload, emit
from offload.planner.virtual import LANES, Clock, Event, Sharing, replay
from offload.runtime.executor import Executor
from offload.runtime.timeline import Timeline
from offload.specs import TensorSpec
from offload.tiers.device import Happened

Kind = str  # of a unit: "disk", "host" (resident in main memory) or "here"


def placed(kinds: dict[str, Kind], slots: int, *, device: bool) -> Placement:
    """Units by where their one tensor lives; with a device, all but those that are "here" travel there."""
    tiers = {"disk": Tier.DISK, "host": Tier.HOST, "here": Tier.DEVICE if device else Tier.HOST}
    travel = {u for u, k in kinds.items() if k == "disk" or (device and k == "host")}
    return Placement(
        home={u: tiers[k] for u, k in kinds.items()},
        tables=frozenset(),
        host_ring=Ring(slots, 8) if "disk" in kinds.values() else NO_RING,
        device_ring=Ring(slots, 8) if device else NO_RING,
        bundles={u: (TensorSpec(name=u, nbytes=8, read_nbytes=8, slot_nbytes=8),) for u in kinds if u in travel},
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[Schedule, dict[int, float], dict[str, int], float]:
    """A random schedule with durations, rings and a pause between passes."""
    device = draw(st.booleans())
    names = [f"u{k}" for k in range(draw(st.integers(1, 7)))]
    kinds = {u: draw(st.sampled_from(["disk", "host", "here"])) for u in names}
    slots = draw(st.integers(1, 3))
    placement = placed(kinds, slots, device=device)
    schedule = emit([(u, 8) for u in names], placement)
    work = {s.index: draw(st.integers(1, 40)) / 8 for s in schedule if not isinstance(s, Release)}
    return schedule, work, {"host": slots, "device": slots}, draw(st.integers(0, 16)) / 8


def by_recursion(schedule: Schedule, work: dict[int, float], slots: dict[str, int], passes: int) -> list[Event]:
    """The rules once more, as recursion over steps: lanes never slow each other down."""
    releases: dict[int, list[Release]] = {}
    for step in schedule:
        if isinstance(step, Release):
            releases.setdefault(step.after[0], []).append(step)
    clock = dict.fromkeys(LANES.values(), 0.0)
    freed = {ring: [0.0] * depth for ring, depth in slots.items()}
    done: dict[tuple[int, int], float] = {}
    queues = {lane: [(s, n) for n in range(passes) for s in schedule if LANES.get(type(s)) == lane] for lane in clock}
    events: list[Event] = []
    while any(queues.values()):
        for lane, queue in queues.items():
            while queue and all((i, queue[0][1]) in done for i in queue[0][0].after):
                step, number = queue[0]
                start = max([clock[lane], *(done[i, number] for i in step.after)])
                if isinstance(step, Read | Upload):
                    if not freed[step.ring]:
                        break
                    earliest = min(freed[step.ring])
                    freed[step.ring].remove(earliest)
                    start = max(start, earliest)
                end = start + work[step.index]
                clock[lane] = done[step.index, number] = end
                events.append(Event(step, number, start, end))
                for release in releases.get(step.index, ()):
                    freed[release.ring].append(end)
                queue.pop(0)
    return sorted(events, key=lambda e: (e.start, e.step.index))


@given(cases())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_without_sharing_it_is_the_recursion(case: tuple[Schedule, dict[int, float], dict[str, int], float]) -> None:
    schedule, work, slots, _ = case
    found = replay(schedule, lambda s: work[s.index], slots=slots, passes=3)
    expected = by_recursion(schedule, work, slots, 3)
    assert [(e.step.index, e.number) for e in found] == [(e.step.index, e.number) for e in expected]
    assert [(e.start, e.end) for e in found] == [(pytest.approx(e.start), pytest.approx(e.end)) for e in expected]


@given(cases())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_load_bound_and_sum(case: tuple[Schedule, dict[int, float], dict[str, int], float]) -> None:
    """In the long run a pass takes no less than its busiest lane and no more than all lanes one after the other."""
    schedule, work, slots, between = case
    clock = Clock(schedule, lambda s: work[s.index], slots=slots, between_s=between)
    run = clock.run(12, head_start=True)
    assert sum(run.pass_s) + between * 0 <= 12 * clock.serial_s + 1e-9
    assert sum(run.pass_s[6:]) >= 6 * clock.bound_s - clock.serial_s * 2 - 1e-9
    steady = clock.run(400, head_start=True, stop_when_steady=True)
    if steady.is_steady:
        last = steady.pass_s[-1]
        assert clock.bound_s - 1e-9 <= last <= clock.serial_s + 1e-9
        far = clock.run(len(steady.pass_s) + 7, head_start=True).pass_s
        assert far[len(steady.pass_s) - 1 :] == pytest.approx([last] * 8)


@given(cases(), st.floats(0.0, 2.0))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_waking_up_takes_what_was_waited_at_most(
    case: tuple[Schedule, dict[int, float], dict[str, int], float], waking: float
) -> None:
    """Each computation that waited takes so much longer, but no longer than it had waited; bounds hold with it, too."""
    schedule, work, slots, between = case
    clocks = [Clock(schedule, lambda s: work[s.index], slots=slots, between_s=between, waking_s=w) for w in (0, waking)]
    plain, woken = (clock.run(8, head_start=True) for clock in clocks)
    more = woken.busy_s["compute"] - plain.busy_s["compute"]
    assert -1e-9 <= more <= woken.stall_s + 1e-9
    assert sum(woken.pass_s) >= sum(plain.pass_s) - 1e-9
    assert sum(woken.pass_s) <= 8 * clocks[1].serial_s + 1e-9


@given(cases(), st.sampled_from([Read, Upload, Compute]), st.floats(0.3, 1.0))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_faster_is_never_slower(
    case: tuple[Schedule, dict[int, float], dict[str, int], float], kind: type[Step], factor: float
) -> None:
    """Without sharing, times are maxima of sums: none grows when a duration shrinks."""
    schedule, work, slots, between = case
    slow = Clock(schedule, lambda s: work[s.index], slots=slots, between_s=between).run(4)
    quick = Clock(
        schedule, lambda s: work[s.index] * (factor if isinstance(s, kind) else 1), slots=slots, between_s=between
    ).run(4)
    assert sum(quick.pass_s) <= sum(slow.pass_s) + 1e-9


def chain(n: int, slots: int) -> tuple[Schedule, dict[str, int]]:
    placement = placed({f"u{k}": "disk" for k in range(n)}, slots, device=False)
    return emit([(f"u{k}", 8) for k in range(n)], placement), {"host": slots, "device": 0}


def run_of(n: int, slots: int, read: float, compute: float, **options: object) -> Clock:
    schedule, rings = chain(n, slots)
    cost = {Read: read, Compute: compute}
    return Clock(schedule, lambda s: cost[type(s)], slots=rings, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("read", "compute"), [(3.0, 1.0), (1.0, 3.0), (2.0, 2.0)])
def test_closed_forms(read: float, compute: float) -> None:
    assert run_of(8, 2, read, compute).run(1).pass_s[0] == read + 7 * max(read, compute) + compute
    assert run_of(8, 1, read, compute).run(1).pass_s[0] == 8 * (read + compute)
    steady = run_of(8, 2, read, compute).run(9, stop_when_steady=True)
    assert steady.is_steady
    assert steady.pass_s[-1] == 8 * max(read, compute)


def test_what_lies_between_passes_hides_behind_reads() -> None:
    clock = run_of(4, 2, 2.0, 1.0, between_s=2.0)
    steady = clock.run(20, stop_when_steady=True)
    assert steady.is_steady
    assert steady.pass_s[-1] == pytest.approx(8.0)  # the disk is busy all the time
    assert run_of(4, 2, 2.0, 1.0, between_s=3.0).run(20, stop_when_steady=True).pass_s[-1] == pytest.approx(9.0)


def test_lanes_slow_each_other_down() -> None:
    """Both at half their rate: two seconds of reading beside computing are four."""
    keeps = {"read": {"compute": 0.5}, "compute": {"read": 0.5}}
    clock = run_of(8, 2, 2.0, 2.0, sharing=Sharing(keeps=keeps))
    run = clock.run(9, stop_when_steady=True)
    assert run.pass_s[-1] == pytest.approx(8 * 4.0)
    only = run_of(8, 2, 2.0, 1.0, sharing=Sharing(keeps={"read": {"compute": 0.5}}))
    assert only.run(9, stop_when_steady=True).pass_s[-1] == pytest.approx(8 * 2.5)  # one second of each two is halved


def test_a_shared_memory_is_shared_in_proportion() -> None:
    demand = {(lane, f"u{k}"): 60.0 for lane in ("read", "compute") for k in range(8)}
    clock = run_of(8, 2, 2.0, 2.0, sharing=Sharing(demand=demand, capacity=60.0))
    assert clock.run(9, stop_when_steady=True).pass_s[-1] == pytest.approx(8 * 4.0)
    roomy = run_of(8, 2, 2.0, 2.0, sharing=Sharing(demand=demand, capacity=120.0))
    assert roomy.run(9, stop_when_steady=True).pass_s[-1] == pytest.approx(8 * 2.0)


def test_a_head_start_fills_the_rings() -> None:
    cold, warm = run_of(8, 2, 3.0, 1.0).run(1), run_of(8, 2, 3.0, 1.0).run(1, head_start=True)
    assert cold.pass_s[0] == pytest.approx(8 * 3.0 + 1.0)
    assert warm.pass_s[0] == pytest.approx(
        1.0 + 6 * 3.0 + 1.0
    )  # two bundles are there; a third begins with a free slot


class Stepped:
    """A mover whose transfers end when the test says so."""

    keeps_alignment = has_memory = False

    def __init__(self, slots: int) -> None:
        self.device = self
        self.host_ring, self.device_ring = BufferPool(slots, 0), BufferPool(slots, 0)
        self.begun: list[tuple[str, str]] = []
        self.reads: dict[str, list[Future[int]]] = {}
        self.gates: dict[str, threading.Semaphore] = {}
        self.changed = threading.Condition()
        self.lets_go = False

    def read(self, unit: str, lease: Lease) -> Future[int]:
        future: Future[int] = Future()
        with self.changed:
            self.begun.append(("read", unit))
            self.reads.setdefault(unit, []).append(future)
            if self.lets_go:
                future.set_result(8)
            self.changed.notify_all()
        return future

    def upload(self, unit: str, host_slot: int | None, device_slot: int, after: object) -> Happened:
        with self.changed:
            self.begun.append(("upload", unit))
            gate = self.gates.setdefault(unit, threading.Semaphore(0))
            if self.lets_go:
                gate.release()
            self.changed.notify_all()
        assert gate.acquire(timeout=HANGS_S)
        return Happened()

    def order_compute_after(self, event: object) -> None: ...

    def mark_compute(self) -> Happened:
        return Happened()

    def synchronize(self) -> None: ...

    def let_go(self) -> None:
        """Ends all transfers, those that begin from now on too."""
        with self.changed:
            self.lets_go = True
            for future in [future for futures in self.reads.values() for future in futures]:
                if not future.done():
                    future.set_result(8)
            for gate in self.gates.values():
                gate.release()

    def await_begun(self, what: tuple[str, str], count: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.begun.count(what) >= count, HANGS_S), f"{what} did not begin"


@pytest.mark.parametrize("device", [False, True])
@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("pace", [(1.0, 0.7, 0.4), (0.3, 0.5, 1.1), (0.9, 0.2, 1.0)])
def test_the_executor_runs_in_the_order_of_the_clock(device: bool, slots: int, pace: tuple[float, ...]) -> None:
    """Every transfer that the clock starts, the real lanes have started by then; nothing starts before its slot.

    The clock's events are played to the real executor: what the clock says ends, ends, in that order. A lane that
    waited for more than the clock's rules say would never begin (the wait below fails); one that waited for less would
    take a slot that is not free (the ring's own check).
    """
    kinds = {"a": "disk", "b": "host", "c": "disk", "d": "here", "e": "disk", "f": "host"}
    placement = placed(kinds, slots, device=device)
    order = [(u, 8) for u in kinds]
    cost = dict(zip((Read, Upload, Compute), pace, strict=True))
    schedule = emit(order, placement)
    rings = {"host": slots, "device": slots}
    events = replay(schedule, lambda s: cost[type(s)] * (1 + 0.01 * s.index), slots=rings, passes=3)
    marks = sorted(
        [(e.end, 0, e) for e in events] + [(e.start, 1, e) for e in events], key=lambda m: (m[0], m[1], m[2].step.index)
    )
    mover = Stepped(slots)
    runner = Executor([u for u, _ in order], lambda names: emit([(u, 8) for u in names], placement), mover, Timeline())
    try:
        for _, is_start, event in marks:
            unit, what = event.step.unit, LANES[type(event.step)]
            if is_start and what == "compute":
                runner.enter(unit)  # returns at once: what it needs has arrived
            elif is_start:
                mover.await_begun((what, unit), event.number + 1)
            elif what == "compute":
                runner.leave()
            elif what == "read":
                mover.reads[unit][event.number].set_result(8)
            else:
                mover.gates[unit].release()
        assert runner.statistics().restarts == 0
    finally:
        mover.let_go()
        runner.close()
