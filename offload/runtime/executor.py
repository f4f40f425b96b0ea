"""Runs a schedule under a model that drives: lanes run ahead of it, entering a unit is the rendezvous.

One thread per lane walks the steps of its verbs, pass after pass, and blocks on two things only: the steps that a
step names, and a free slot of its ring. The model's own thread is the compute lane: `enter` waits until the unit's
bundle has arrived, `leave` gives its slot back. So at any time

    read lane      is as far ahead as the host ring has slots
    upload lane    is as far ahead as the device ring has slots, and behind the read lane
    compute lane   is where the model is

A model need not follow the schedule. When it enters another unit than expected, the lanes are stopped, what they
fetched is dropped, and they start again from that unit; the order of a whole pass that was seen to differ becomes the
schedule.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from offload.io.buffers import BufferPool, Interrupted, Lease
from offload.planner.schedule import Compute, Read, Release, Schedule, Step, Upload
from offload.runtime.timeline import Timeline, now
from offload.tiers.device import Device, Event

Emit = Callable[[Sequence[str]], Schedule]


class Mover(Protocol):
    """What the executor asks to move bytes; the store is one."""

    device: Device
    host_ring: BufferPool
    device_ring: BufferPool

    def read(self, unit: str, lease: Lease) -> Future[int]: ...

    def upload(self, unit: str, host_slot: int | None, device_slot: int, after: Event | None) -> Event: ...


@dataclass(slots=True)
class Flight:
    """A bundle on its way, or arrived: one run of a Read or Upload step.

    Attributes:
        lease: the slot it fills.
        event: set when it is done; for an upload, what compute must be ordered after.
    """

    lease: Lease
    is_done: bool = False  # and its bytes are good: a flight that failed never is
    event: Event | None = None


@dataclass(frozen=True, slots=True)
class ExecutorStatistics:
    """Counts since the start: units entered, whole passes, and how often the model left the schedule."""

    entered: int
    passes: int
    restarts: int


_Key = tuple[int, int]  # step index, pass number


class Executor:
    """Lanes and rendezvous for one model.

    Args:
        order: unit names in the expected order of execution.
        emit: makes the schedule of one pass for an order of units.
        mover: moves bundles; owns the rings.
        timeline: receives spans and stalls.
        counts_compute: whether what lies between `enter` and `leave` is a span; False where the caller knows better.
    """

    def __init__(
        self, order: Sequence[str], emit: Emit, mover: Mover, timeline: Timeline, *, counts_compute: bool = True
    ) -> None:
        self._counts_compute = counts_compute
        self._full_order, self._emit, self._mover, self._timeline = tuple(order), emit, mover, timeline
        self._changed = threading.Condition()
        self._flights: dict[_Key, Flight] = {}
        self._in_flight = 0
        self._failure: BaseException | None = None
        self._slot_computes: dict[int, Event] = {}  # device slot -> the compute that last used it
        self._threads: list[threading.Thread] = []
        self._is_stopping = False
        self._trace: list[str] = []
        self._strayed = False
        self._entered = self._passes = self._restarts = 0
        self._inside: tuple[Compute, float] | None = None
        self._start(self._full_order, 0)

    # The model's side.

    def enter(self, unit: str) -> Lease | None:
        """The rendezvous: waits for the unit's bundle. Returns the slot it lies in, or None when nothing travels.

        Raises:
            StorageError: its bundle could not be read.
        """
        self._inside = None
        if self._is_stopping:  # a restart was interrupted half way
            self._stop()
            self._start(self._order, self._at)
        if self._computes[self._at].unit != unit:
            self._restart_at(unit)
        step = self._computes[self._at]
        self._trace.append(unit)
        self._entered += 1
        start = now()
        flight = None
        for index in step.after:
            flight = self._wait_for((index, self._pass), start, step)
        if flight is not None and flight.event is not None:
            self._mover.device.order_compute_after(flight.event)
        self._inside = step, now()
        return flight.lease if flight is not None else None

    def leave(self) -> None:
        """The unit's forward has returned (or failed): its slot goes back, the model goes on to the next unit."""
        if self._inside is None:
            return
        step, start = self._inside
        self._inside = None
        if self._counts_compute:
            self._timeline.add("compute", step.unit, start, now(), step.nbytes)
        for release in self._releases.get(step.index, ()):
            self._release(release, self._schedule[step.after[0]], self._pass)
        self._at += 1
        if self._at == len(self._computes):
            self._at, self._pass, self._passes = 0, self._pass + 1, self._passes + 1

    def begin_pass(self) -> None:
        """The whole model is about to run."""
        self._trace.clear()

    def end_pass(self) -> None:
        """The whole model has run: if it left the schedule on the way, its real order becomes the schedule."""
        if self._strayed and self._trace:
            self._strayed = False
            order = tuple(self._trace)
            if order != self._order:
                self._stop()
                self._start(order, 0)

    def pause(self) -> None:
        """Stops the lanes until `follow` says how to go on; nothing is in flight when it returns."""
        self._stop()

    def follow(self, order: Sequence[str]) -> None:
        """The next pass runs in this order, from its beginning."""
        self._trace.clear()
        self._strayed = False
        if self._is_stopping or tuple(order) != self._order or self._at:
            self._stop()
            self._start(tuple(order), 0)

    def statistics(self) -> ExecutorStatistics:
        return ExecutorStatistics(self._entered, self._passes, self._restarts)

    @property
    def schedule(self) -> Schedule:
        """The steps of one pass, as they run now."""
        return self._schedule

    def close(self) -> None:
        """Stops the lanes, waits for what is in flight and gives every slot back. May be called twice."""
        self._stop()

    # Lanes.

    def _start(self, order: tuple[str, ...], at: int) -> None:
        """Starts the lanes so that the model's next unit is `order[at]`."""
        self._order = order
        self._schedule = self._emit(order)
        self._computes = [s for s in self._schedule if isinstance(s, Compute)]
        self._releases: dict[int, list[Release]] = {}
        for step in self._schedule:
            if isinstance(step, Release):
                self._releases.setdefault(step.after[0], []).append(step)
        self._at, self._pass, self._failure = at, 0, None
        self._mover.host_ring.resume()
        self._mover.device_ring.resume()
        first = min((k for k, s in enumerate(self._schedule) if s.unit == order[at] and self._is_of(s, at)), default=0)
        self._is_stopping = False
        for verb in (Read, Upload):
            steps = [s for s in self._schedule if isinstance(s, verb)]
            if steps:
                thread = threading.Thread(
                    target=self._lane, args=(steps, first), name=f"offload-{verb.__name__.lower()}", daemon=True
                )
                self._threads.append(thread)
                thread.start()

    def _is_of(self, step: Step, at: int) -> bool:
        """Whether the step belongs to the `at`-th compute of the schedule, not to an earlier visit of the same unit."""
        before = self._computes[at - 1].index if at else -1
        return before < step.index <= self._computes[at].index

    def _lane(self, steps: Sequence[Step], first: int) -> None:
        """One lane: its steps in order, for ever; in the first pass only those from `first` on."""
        try:
            number = 0
            while True:
                for step in steps:
                    if number or step.index >= first:
                        self._run(step, number)
                number += 1
        except Interrupted:
            return
        except BaseException as error:
            self._fail(error)

    def _run(self, step: Step, number: int) -> None:
        if isinstance(step, Read):
            lease = self._mover.host_ring.lease()
            self._depart(step, number, Flight(lease))
            start = now()
            try:
                future = self._mover.read(step.unit, lease)
            except BaseException:
                self._land(step, number, is_done=False)
                raise
            future.add_done_callback(lambda f: self._arrive(step, number, start, f))
            return
        assert isinstance(step, Upload)
        below = None
        for index in step.after:
            below = self._await(index, number)
        lease = self._mover.device_ring.lease()
        flight = Flight(lease)
        self._depart(step, number, flight)
        start = now()
        try:
            slot = below.lease.index if below is not None else None
            after = self._slot_computes.pop(lease.index, None)
            flight.event = self._mover.upload(step.unit, slot, lease.index, after)
        finally:
            self._land(step, number, is_done=flight.event is not None)
        for release in self._releases.get(step.index, ()):
            flight.event.wait()  # the host slot may be overwritten only when its bytes have left
            self._release(release, self._schedule[step.after[0]], number)
        self._timeline.add("upload", step.unit, start, now(), step.nbytes)

    def _depart(self, step: Step, number: int, flight: Flight) -> None:
        with self._changed:
            self._in_flight += 1
            self._flights[step.index, number] = flight

    def _land(self, step: Step, number: int, *, is_done: bool) -> None:
        with self._changed:
            self._in_flight -= 1
            self._flights[step.index, number].is_done = is_done
            self._changed.notify_all()

    def _arrive(self, step: Read, number: int, start: float, future: Future[int]) -> None:
        """A read has ended; runs in an I/O thread."""
        error = future.exception()
        if error is not None:
            self._fail(error)
        else:
            self._timeline.add("read", step.unit, start, now(), future.result())
        self._land(step, number, is_done=error is None)

    def _await(self, index: int, number: int) -> Flight:
        """Waits in a lane for a step of the same pass."""
        key = (index, number)
        with self._changed:
            while not (key in self._flights and self._flights[key].is_done):
                if self._is_stopping or self._failure is not None:
                    raise Interrupted("the lanes are stopping")
                self._changed.wait()
            if self._failure is not None:
                raise Interrupted("a transfer failed")
            return self._flights[key]

    def _wait_for(self, key: _Key, start: float, step: Compute) -> Flight:
        """Waits in the model's thread; time that passes is a stall of the model."""
        with self._changed:
            waited = False
            while not (key in self._flights and self._flights[key].is_done) and self._failure is None:
                waited = True
                self._changed.wait()
            arrived = key in self._flights and self._flights[key].is_done
            failure = None if arrived else self._failure
        if waited:
            lane = type(self._schedule[key[0]]).__name__.lower()
            self._timeline.stall(f"compute:{lane}", step.unit, start, now())
        if failure is not None:
            self._stop()
            self._start(self._order, self._at)  # a later call may find the disk well again
            raise failure
        return self._flights[key]

    def _release(self, release: Release, step: Step, number: int) -> None:
        """Gives the slot that `step` took back to its ring."""
        with self._changed:
            flight = self._flights.pop((step.index, number))
        if release.ring == "device":
            self._slot_computes[flight.lease.index] = self._mover.device.mark_compute()
        flight.lease.release()

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            if self._failure is None:
                self._failure = error
            self._changed.notify_all()

    # Leaving the schedule.

    def _restart_at(self, unit: str) -> None:
        """Starts again from a unit that was not expected here: further on in this order, or else in the full one."""
        self._restarts += 1
        self._strayed = True
        self._stop()
        ahead = [*range(self._at, len(self._order)), *range(self._at)]
        at = next((k for k in ahead if self._order[k] == unit), None)
        if at is not None:
            self._start(self._order, at)
        else:
            self._start(self._full_order, self._full_order.index(unit))

    def _stop(self) -> None:
        """Stops the lanes; when it returns nothing is in flight and every slot is free."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        self._mover.host_ring.interrupt()
        self._mover.device_ring.interrupt()
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        with self._changed:
            while self._in_flight:
                self._changed.wait()
            while self._flights:
                self._flights.popitem()[1].lease.release()
        self._mover.device.synchronize()  # uploads and computes that still use a slot
        self._slot_computes.clear()
        self._inside = None
