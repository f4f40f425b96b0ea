"""Training on an accelerator: the model's thread has it compute, and three lanes of their own do all the rest.

    upload lane     weights, updated or read: main memory -> a slot           as far ahead as the ring has slots
    model's thread  forward, backward; the gradient takes the weights' place in the slot
    download lane   gradient: the slot -> main memory, where the weights were; the slot goes back
    update lane     gradient and state -> weights and state, on the CPU; what travels is written

Each does its steps of the tuple in order, and waits for those that a step comes after. So updates run beside the
accelerator's work: those of a unit behind its backward, or, where the clip factor must be known first, ahead of its
forward in the next step. Losses and gradients are those of the device; updates, those of the CPU.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

from offload.io.buffers import Lease
from offload.planner.schedule import Release, Schedule, Step, Upload
from offload.planner.training_steps import Backward, Forward
from offload.runtime.progress import MODEL, lanes
from offload.runtime.timeline import now
from offload.runtime.training_lanes import LOOSE, Lane
from offload.runtime.training_walk import Walk
from offload.tiers.device import Device, Event, Happened
from offload.tiers.device_cells import DeviceCells


@dataclass(frozen=True, slots=True)
class Flight:
    """A cell on the accelerator: its slot, None for a place of its own, and what orders its bytes."""

    lease: Lease | None
    event: Event

    @property
    def slot(self) -> int | None:
        return None if self.lease is None else self.lease.index


class WalkBeside(Walk):
    """See Walk. Of the steps, the model's thread does visits only, and gives slots back behind a forward.

    Args:
        there: the cells on the accelerator.
        device: it.
        overlaps: lanes work at once.
    """

    def __init__(self, *parts: Any, there: DeviceCells, device: Device, overlaps: bool = True) -> None:
        super().__init__(*parts)
        self._lanes.progress.in_order = not overlaps
        self._there, self._device = there, device
        self._names: list[str] = []  # of each step, its lane
        self._flights: dict[str, deque[Flight]] = {}  # arrived, and not entered yet; bounded by the ring
        self._lent: dict[str, Flight] = {}  # of units that are visited
        self._left: dict[str, Flight] = {}  # of those whose gradient is there
        self._down: dict[str, Lease] = {}  # of those whose gradient comes down
        self._used: dict[int | str, Event] = {}  # slot, or unit with its own place -> the compute that last used it
        beside = (
            Lane("upload", self._upload, is_ahead=True),
            Lane("download", self._download, is_ahead=False),
            Lane("update", self._run, is_ahead=False),
        )
        self._lanes.split(beside, there.ring, self._drop)

    # The model's thread.

    def begin(self, schedule: Schedule, *, repeats: bool, at: int = 0) -> None:
        """See Walk. What belongs to no unit is there from the beginning, since anything may use it."""
        if not self._lanes.is_running:
            self.put_away()
        self._parameters.hide(self._parameters.trained)
        self._names = lanes(schedule)
        self._schedule, self._at = schedule, at
        self._lanes.begin(schedule, repeats=repeats, at=at)
        if any(isinstance(step, Upload) and step.unit == LOOSE for step in schedule):
            self._arrive(LOOSE)

    def enter(self, unit: str) -> None:
        """See Walk."""
        step = self._schedule[self._at]
        self._lanes.progress.wait_turn(step)
        if isinstance(step, Forward) or not self._there.stays(unit):
            self._arrive(unit)
        else:
            self._lent[unit] = Flight(None, self._used.get(unit, Happened()))
            self._parameters.show(self._there.show(unit, None))
        self._entered = now()

    def leave(self, unit: str) -> None:
        """See Walk."""
        self._depart(self._schedule[self._at])
        super().leave(unit)

    def finish(self) -> None:
        """See Walk. Waits for all lanes."""
        while self._at < len(self._schedule):
            self._do(self._schedule[self._at])
        start = now()
        self._lanes.progress.finish(len(self._schedule))
        self._timeline.stall("compute:update", "the end of the pass", start, now())

    def let_go(self, unit: str) -> Lease:
        """See Walk. What the model uses is elsewhere."""
        self._cells.take_back(unit)
        return self._held_cells.pop(unit)

    def _do(self, step: Step) -> None:
        if self._names[self._at] == MODEL:
            if isinstance(step, Forward) and self._cells.layouts[step.unit].places:  # not visited, but brought
                self._arrive(step.unit)
                self._depart(step)
            elif isinstance(step, Backward) and step.unit == LOOSE:  # its sums are in place
                self._depart(step)
        self._next()

    def _arrive(self, unit: str) -> None:
        """Waits for a unit's weights, and shows them."""
        start, progress = now(), self._lanes.progress
        progress.wait_model(lambda: bool(self._flights.get(unit)))
        with progress.changed:
            self._lent[unit] = flight = self._flights[unit].popleft()
        self._timeline.stall("compute:upload", unit, start, now())
        self._device.order_compute_after(flight.event)
        self._parameters.show(self._there.show(unit, flight.slot))

    def _depart(self, step: Step) -> None:
        """A visit has ended: when its work is done, the gradient may go down, or the slot be used again."""
        unit, event = step.unit, self._device.mark_compute()
        self._parameters.hide(self._there.layouts[unit].places)
        self._there.hide(unit)
        lease = self._lent.pop(unit).lease
        if isinstance(step, Backward):
            self._left[unit] = Flight(lease, event)
        else:
            self._used[unit if lease is None else lease.index] = event
            if lease is not None:
                lease.release()

    # The lanes beside.

    def _upload(self, step: Step) -> None:
        if isinstance(step, Release):
            self.let_go(step.unit).release()
            return
        assert isinstance(step, Upload)
        unit, progress = step.unit, self._lanes.progress
        self._bring(unit)
        lease = self._there.ring.lease() if step.ring is not None else None
        try:
            start = now()
            after = self._used.pop(unit if lease is None else lease.index, None)
            event = self._device.upload(
                [(self._there.area(unit, lease and lease.index), self._cells.area(unit))], after
            )
            event.wait()  # so that the memory may be used again, and the span is true
        except BaseException:
            if lease is not None:
                lease.release()
            raise
        self._timeline.add("upload", unit, start, now(), step.nbytes)
        with progress.changed:
            self._flights.setdefault(unit, deque()).append(Flight(lease, event))
            progress.changed.notify_all()

    def _download(self, step: Step) -> None:
        if isinstance(step, Release):
            self._down.pop(step.unit).release()
            return
        flight = self._left.pop(step.unit)
        if flight.lease is not None:
            self._down[step.unit] = flight.lease
        self._bring(step.unit)
        start = now()
        pair = self._cells.area(step.unit), self._there.area(step.unit, flight.slot)
        self._device.download_into([pair], flight.event).wait()
        self._timeline.add("download", step.unit, start, now(), pair[0].numel())

    def _drop(self) -> None:
        """The lanes have stopped: gives back what they hold."""
        flights = [flight for arrived in self._flights.values() for flight in arrived]
        flights += [*self._lent.values(), *self._left.values()]
        leases = [f.lease for f in flights if f.lease is not None]
        for lease in [*leases, *self._down.values(), *self._held_shards.values()]:
            lease.release()
        for table in (self._flights, self._lent, self._left, self._down, self._used, self._held_shards):
            table.clear()
        self._device.synchronize()
        self.put_away()
