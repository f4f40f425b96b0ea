"""A virtual clock: replays a schedule in no time, with stated durations, under the executor's own rules.

The rules are those of runtime/executor.py: a lane runs its steps in order; a step starts when the steps it names are
done and, if it takes a slot, when its ring has one free; a Release returns the slot of the step it follows. Reads of
one lane overlap as far as slots allow, but the I/O engine serves them one after the other (io/requests.py). So are
writes, in a lane of their own, downloads, and what the CPU computes beside an accelerator.

Lanes that run at the same time may slow each other down: then durations are work, and work is done at the rate that
the lanes running beside leave (a fluid model: rates change only where something starts or ends).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf

from offload.planner.schedule import LANES, Release, Schedule, Step, lane_of

NAMES = (*(lane for lane in LANES.values() if lane != "compute"), "update", "compute")
TAKERS = ("read", "upload")  # lanes whose steps take slots
Keeps = Mapping[str, Mapping[str, float]]
_EPSILON = 1e-12


@dataclass(frozen=True, slots=True)
class Event:
    """One run of a step, in virtual seconds."""

    step: Step
    number: int  # of the pass, from 0
    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """What lanes take from each other.

    Attributes:
        keeps: lane -> another -> the part of its own rate that it keeps while the other runs.
        demand: (lane, unit) -> bytes per second of the shared memory that its steps take at their own rate.
        capacity: bytes per second of that memory; those who use it slow down in proportion where they ask for more.
    """

    keeps: Keeps = field(default_factory=dict)
    demand: Mapping[tuple[str, str], float] = field(default_factory=dict)
    capacity: float = inf


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a replay found.

    Attributes:
        pass_s: seconds of each pass, from the end of the one before (the first from the start of computing).
        events: what ran when, in order of start; empty unless they were asked for.
        busy_s: lane -> seconds in which it worked, over all passes.
        stall_s: seconds that computing waited for a read or an upload, over all passes.
        is_steady: the last pass ended in the very state in which it began, so that it repeats for ever.
    """

    pass_s: tuple[float, ...]
    events: tuple[Event, ...]
    busy_s: Mapping[str, float]
    stall_s: float
    is_steady: bool


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
    return list(Clock(schedule, seconds, slots=slots).run(passes, records=True).events)


class Clock:
    """A schedule with its durations, ready to be run any number of times.

    Args:
        schedule: one pass.
        seconds: how long a step takes by itself.
        slots: ring name -> its depth.
        sharing: what lanes take from each other.
        between_s: what the model's thread does between two passes.
        waking_s: what a computation that waited for its bundle takes beyond one that follows another at once: threads
            have gone to sleep and caches are cold. After a shorter wait it is as long as that.
        joined: lanes that have to end a pass before the model begins the next one.
    """

    def __init__(
        self,
        schedule: Schedule,
        seconds: Callable[[Step], float],
        *,
        slots: Mapping[str, int],
        sharing: Sharing | None = None,
        between_s: float = 0.0,
        waking_s: float = 0.0,
        joined: Collection[str] = (),
    ) -> None:
        self._slots, self._between, self._waking = dict(slots), between_s, waking_s
        sharing = sharing or Sharing()
        releases: dict[int, list[str]] = {}
        ends: dict[int, int] = {}  # release -> what it follows, since it takes no time itself: one may follow another
        for step in schedule:
            if isinstance(step, Release):
                ends[step.index] = end = ends.get(step.after[0], step.after[0])
                if step.ring in slots:
                    releases.setdefault(end, []).append(step.ring)
        lanes: dict[str, list[Step]] = {name: [] for name in NAMES}
        for step in schedule:
            if lane := lane_of(step):
                lanes[lane].append(_behind_others(step, ends) if ends.keys() & {*step.after, *step.behind} else step)
        self._names = tuple(name for name in NAMES if lanes[name])  # those with work; the last one is the model
        self._steps = [lanes[name] for name in self._names]
        self._joined = [k for k, name in enumerate(self._names) if name in joined]
        self._rings = [
            [getattr(s, "ring", None) if name in TAKERS else None for s in lanes[name]] for name in self._names
        ]
        self._work = [[seconds(step) for step in steps] for steps in self._steps]
        self._frees = [[releases.get(step.index, ()) for step in steps] for steps in self._steps]
        self._demand = [
            [sharing.demand.get((lane, s.unit), 0.0) for s in steps]
            for lane, steps in zip(self._names, self._steps, strict=True)
        ]
        self._shares = any(any(d) for d in self._demand) and sharing.capacity < inf
        self._capacity = sharing.capacity
        self._rates = [_rates(self._names, mask, sharing.keeps) for mask in range(1 << len(self._names))]
        self._size = len(schedule)

    def work_s(self, lane: str) -> float:
        """What a lane has to do in one pass, by itself."""
        return sum(self._work[self._names.index(lane)]) if lane in self._names else 0.0

    @property
    def bound_s(self) -> float:
        """No pass can be shorter in the long run: the busiest lane, the model's thread with what lies between."""
        return max(*(self.work_s(lane) for lane in NAMES[:-1]), self.work_s("compute") + self._between)

    @property
    def serial_s(self) -> float:
        """A pass in which nothing overlaps."""
        waits = sum(1 for step in self._steps[-1] if step.after)
        return sum(map(self.work_s, NAMES)) + self._between + waits * self._waking

    def run(
        self, passes: int, *, records: bool = False, head_start: bool = False, stop_when_steady: bool = False
    ) -> Run:
        """Runs passes from an idle start.

        Args:
            records: keep every event.
            head_start: the lanes have filled their rings before the model starts, as they do after loading.
            stop_when_steady: stop before `passes` once a pass repeats the one before exactly.
        """
        return _Replay(self, records).run(passes, head_start, stop_when_steady)


def _behind_others(step: Step, ends: Mapping[int, int]) -> Step:
    """The same step, which waits for what releases follow instead of releases."""
    after, behind = (tuple(ends.get(k, k) for k in found) for found in (step.after, step.behind))
    return replace(step, after=after, behind=behind)


def _rates(names: Sequence[str], mask: int, keeps: Keeps) -> tuple[float, ...]:
    """The part of its own rate that each lane has while those of `mask` run."""
    rates = []
    for k, lane in enumerate(names):
        rate = 1.0
        for j, other in enumerate(names):
            if j != k and mask >> j & 1:
                rate *= keeps.get(lane, {}).get(other, 1.0)
        rates.append(rate)
    return tuple(rates)


class _Replay:
    """One run of a clock: where every lane is, what is done, which slots are free."""

    def __init__(self, clock: Clock, records: bool) -> None:
        self.clock, self.records = clock, records
        self.now = 0.0
        self.count = count = len(clock._names)
        self.model = count - 1  # its lane
        self.at, self.number = [0] * count, [0] * count  # of each lane: the step it runs or will run next, and its pass
        self.left: list[float | None] = [None] * count  # work that is left of the running step
        self.began = [0.0] * count
        self.done: set[tuple[int, int]] = set()
        self.free = dict(clock._slots)
        self.busy = [0.0] * count
        self.stall = 0.0
        self.ready = 0.0  # when the model's thread is
        self.is_held = False
        self.events: list[Event] = []

    def run(self, passes: int, head_start: bool, stop_when_steady: bool) -> Run:
        assert self.clock._names[-1:] == ("compute",), "a schedule without computing"
        ends: list[float] = []
        self.is_held = head_start
        begin, last_state, is_steady = 0.0, None, False
        while len(ends) < passes:
            self._start(passes if not stop_when_steady else passes + 1)
            if all(left is None for left in self.left):
                if self.is_held:  # the rings are full: the model may start
                    self.is_held, begin, self.ready = False, self.now, self.now
                    continue
                assert self.ready > self.now, "a schedule that cannot go on: a ring without slots, or steps that wait"
                self.now = self.ready
                continue
            finished = self._advance()
            for lane in finished:
                if lane == self.model and self.at[self.model] == 0:  # the last unit of a pass
                    ends.append(self.now)
                    self.done = {key for key in self.done if key[1] >= min(self.number) - 1}
                    self.ready = self.now + self.clock._between
                    state = self._state()
                    if state == last_state and stop_when_steady:
                        is_steady = True
                    last_state = state
            if is_steady:
                break
        starts = [begin, *ends[:-1]]
        return Run(
            pass_s=tuple(b - a for a, b in zip(starts, ends, strict=True)),
            events=tuple(sorted(self.events, key=lambda e: (e.start, e.step.index))),
            busy_s=dict.fromkeys(NAMES, 0.0) | dict(zip(self.clock._names, self.busy, strict=True)),
            stall_s=self.stall,
            is_steady=is_steady,
        )

    def _start(self, passes: int) -> None:
        """Starts every step that may start now; those that take no time end at once and may let others start."""
        clock, moved = self.clock, True
        while moved:
            moved = False
            for lane in range(self.count):
                while self.left[lane] is None and self._may_start(lane, passes):
                    waking = 0.0
                    if (ring := clock._rings[lane][self.at[lane]]) is not None:
                        self.free[ring] -= 1
                    elif lane == self.model and self.now > self.ready:
                        self.stall += self.now - self.ready
                        waking = min(clock._waking, self.now - self.ready)
                    self.began[lane] = self.now
                    self.left[lane] = clock._work[lane][self.at[lane]] + waking
                    if self.left[lane] or (lane == self.model and self.at[lane] + 1 == len(clock._steps[lane])):
                        break  # the end of a pass is always an event of its own
                    self._finish(lane)
                    moved = True

    def _may_start(self, lane: int, passes: int) -> bool:
        """Whether a lane's next step may."""
        steps = self.clock._steps[lane]
        at, number = self.at[lane], self.number[lane]
        if number >= passes or (lane == self.model and (self.is_held or self.now < self.ready)):
            return False
        if lane == self.model and not at and any(self.number[k] < number for k in self.clock._joined):
            return False
        step = steps[at]
        ring = self.clock._rings[lane][at]
        if ring is not None and self.free.get(ring, 0) < 1:
            return False
        if step.behind and number and not all((index, number - 1) in self.done for index in step.behind):
            return False
        return all((index, number) in self.done for index in step.after)

    def _advance(self) -> list[int]:
        """Lets time pass until something ends; returns the lanes whose step did."""
        left = self.left
        mask = sum(1 << lane for lane in range(self.count) if left[lane] is not None)
        rates: Sequence[float] = self.clock._rates[mask]
        if self.clock._shares:
            rates = self._shared(rates)
        step = inf
        for lane in range(self.count):
            if (work := left[lane]) is not None:
                step = min(step, work / rates[lane] if rates[lane] else inf)
        if left[self.model] is None and not self.is_held and self.ready > self.now:
            step = min(step, self.ready - self.now)
        self.now += step
        finished = []
        for lane in range(self.count):
            if (work := left[lane]) is not None:
                self.busy[lane] += step
                rest = work - step * rates[lane]
                left[lane] = rest
                if rest <= _EPSILON + 1e-9 * self.clock._work[lane][self.at[lane]]:
                    finished.append(lane)
        for lane in finished:
            self._finish(lane)
        return finished

    def _shared(self, rates: Sequence[float]) -> Sequence[float]:
        """Those who use the shared memory slow down in proportion where together they ask for more than it has."""
        asked = [
            self.clock._demand[k][self.at[k]] * rates[k] if self.left[k] is not None else 0.0 for k in range(self.count)
        ]
        if (total := sum(asked)) <= self.clock._capacity:
            return rates
        return [rate * self.clock._capacity / total if a else rate for rate, a in zip(rates, asked, strict=True)]

    def _finish(self, lane: int) -> None:
        clock = self.clock
        at, number = self.at[lane], self.number[lane]
        step = clock._steps[lane][at]
        if self.records:
            self.events.append(Event(step, number, self.began[lane], self.now))
        self.done.add((step.index, number))
        for ring in clock._frees[lane][at]:
            self.free[ring] += 1
        self.left[lane] = None
        if lane == self.model:
            self.ready = self.now
        if at + 1 == len(clock._steps[lane]):
            self.at[lane], self.number[lane] = 0, number + 1
        else:
            self.at[lane] = at + 1

    def _state(self) -> tuple[object, ...]:
        """Where everything is, relative to the pass: equal states have equal futures."""
        base = self.number[self.model]
        lanes = tuple(
            (self.at[k], self.number[k] - base, None if (left := self.left[k]) is None else round(left, 12))
            for k in range(self.count)
        )
        return lanes, tuple(self.free.values())
