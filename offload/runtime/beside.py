"""Training on an accelerator: the model's thread has it compute, and three lanes of their own do all the rest.

    upload lane     weights, updated or read: main memory -> a slot           as far ahead as the ring has slots
    model's thread  forward, backward; the gradient takes the weights' place in the slot
    download lane   gradient: the slot -> main memory, where the weights were; the slot goes back
    update lane     gradient and state -> weights and state, on the CPU; what travels is written
    aside lane      the same of the shards that the accelerator updates; see updates_there.py

Each does its steps of the tuple in order, and waits for those that a step comes after. So updates run beside the
accelerator's work: those of a unit behind its backward, or, where the clip factor must be known first, ahead of its
forward in the next step. Losses and gradients are those of the device; updates, those of whoever makes them.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from offload.io.buffers import Lease
from offload.planner.schedule import Release, Schedule, Step
from offload.planner.training_steps import (
    Backward,
    DownloadCell,
    DownloadShard,
    Forward,
    UpdateThere,
    UploadCell,
    UploadShard,
    WriteShard,
)
from offload.runtime.progress import MODEL, lanes
from offload.runtime.timeline import now
from offload.runtime.training_lanes import LOOSE, Lane
from offload.runtime.training_walk import Walk
from offload.runtime.updates_there import UpdatesThere
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
        updates: those that it makes itself; None: none.
        overlaps: lanes work at once.
    """

    _updating = "update"

    def __init__(
        self, *parts: Any, there: DeviceCells, device: Device, updates: UpdatesThere | None, overlaps: bool = True
    ) -> None:
        super().__init__(*parts)
        self._lanes.progress.in_order = not overlaps
        self._there, self._device, self._updates = there, device, updates
        self._names: list[str] = []  # of each step, its lane
        self._flights: dict[str, deque[Flight]] = {}  # arrived, and not entered yet; bounded by the ring
        self._lent: dict[str, Flight] = {}  # of units that are visited
        self._left: dict[str, Flight] = {}  # of those whose visit is over
        self._bringing = {unit: threading.Lock() for unit in self._cells.layouts}  # several lanes may want a cell
        self._used: dict[int | str, Event] = {}  # slot, or unit with its own place -> the compute that last used it
        beside = (
            Lane("upload", self._upload, is_ahead=True),
            Lane("download", self._download, is_ahead=False),
            Lane("update", self._run, is_ahead=False),
            Lane("aside", self._update_there, is_ahead=False),
        )
        self._lanes.split(beside, [there.ring, *([updates.slots.ring] if updates else [])], self._drop)

    # The model's thread.

    def begin(self, schedule: Schedule, *, repeats: bool, at: int = 0) -> None:
        """See Walk. What belongs to no unit is there from the beginning, since anything may use it."""
        if not self._lanes.is_running:
            self.put_away()
        self._parameters.hide(self._parameters.trained)
        self._names = lanes(schedule)
        self._schedule, self._at = schedule, at
        self._lanes.begin(schedule, repeats=repeats, at=at)
        first = next((s.index for s in schedule if isinstance(s, Forward)), None)
        if LOOSE in self._there.layouts and first is not None:
            loose = [s.index for s in schedule[:first] if s.unit == LOOSE and isinstance(s, UploadCell | UpdateThere)]
            self._arrive(LOOSE, loose)

    def enter(self, unit: str) -> None:
        """See Walk."""
        step = self._schedule[self._at]
        self._lanes.progress.wait_turn(step)
        if isinstance(step, Forward) or not self._there.stays(unit):
            self._arrive(unit, step.after)
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
                self._arrive(step.unit, step.after)
                self._depart(step)
            elif isinstance(step, Backward) and step.unit == LOOSE:  # its sums are in place
                self._depart(step)
            elif isinstance(step, Release):
                flight = self._left.pop(step.unit)
                assert flight.lease is not None
                self._used[flight.lease.index] = flight.event
                flight.lease.release()
        self._next()

    def _arrive(self, unit: str, after: Sequence[int]) -> None:
        """Waits for a unit's weights, which are there when steps are done, and shows them."""
        start, progress = now(), self._lanes.progress
        progress.wait_done(after)
        with progress.changed:
            arrived = self._flights.get(unit)
            flight = arrived.popleft() if arrived else None
            self._lent[unit] = here = flight or self._resting(unit)
        self._timeline.stall("compute:upload", unit, start, now())
        if flight is not None:  # updates there are waited for where they are made
            self._device.order_compute_after(flight.event)
        self._parameters.show(self._there.show(unit, here.slot))

    def _depart(self, step: Step) -> None:
        """A visit has ended: when its work is done, the gradient may go down, or the slot be used again."""
        unit, event = step.unit, self._device.mark_compute()
        self._parameters.hide(self._there.layouts[unit].places)
        self._there.hide(unit)
        lease = self._lent.pop(unit).lease
        self._left[unit] = Flight(lease, event)
        if lease is None:
            self._used[unit] = event

    def _resting(self, unit: str) -> Flight:
        """A cell that has a place of its own, where nothing had to be brought for it."""
        assert self._there.stays(unit), unit
        return Flight(None, self._used.get(unit, Happened()))

    def come_down(self, unit: str, shards: Sequence[str]) -> None:
        """Brings what was updated there to main memory. No pass is under way."""
        pairs = [(below, above) for above, below in self._pairs(unit, shards, None)]
        self._device.download_into(pairs, None).wait()

    # The lanes beside.

    def _upload(self, step: Step) -> None:
        if isinstance(step, Release):
            if step.ring == "aside":
                self._end_aside(step.unit)
            else:
                self.let_go(step.unit).release()
            return
        if isinstance(step, UploadShard):
            assert self._updates is not None
            self._updates.upload(step)
            return
        assert isinstance(step, UploadCell)
        unit, progress = step.unit, self._lanes.progress
        self._bring(unit, "upload")
        lease = self._there.ring.lease() if step.ring is not None else None
        try:
            start = now()
            flights = self._flights.get(unit)
            slot = lease.index if lease is not None else flights[-1].slot if flights else None
            after = self._used.pop(unit if slot is None else slot, None)
            pairs = self._pairs(unit, step.shards, slot)
            event = self._device.upload(pairs, after)
            event.wait()  # so that the memory may be used again, and the span is true
        except BaseException:
            if lease is not None:
                lease.release()
            raise
        self._timeline.add("upload", unit, start, now(), step.nbytes)
        with progress.changed:
            if lease is not None or not flights:
                self._flights.setdefault(unit, deque()).append(Flight(lease, event))
            progress.changed.notify_all()

    def _update_there(self, step: Step) -> None:
        """A shard's update by the accelerator: its gradient is in what was left there, or has gone up."""
        assert isinstance(step, UpdateThere)
        assert self._updates is not None
        unit, flights = step.unit, self._flights.get(step.unit)
        flight = self._left.get(unit) or (flights[0] if flights else self._resting(unit))
        self._updates.update(step, self._there.area(unit, flight.slot), flight.event, self.numbers)

    def _download(self, step: Step) -> None:
        if isinstance(step, DownloadCell):
            self._download_cell(step)
        elif isinstance(step, DownloadShard):
            assert self._updates is not None
            from_disk = self._updates.download(step)
            if from_disk is None:
                self._lanes.kept.dirty.add(step.shard)
            else:
                self._held_shards[step.shard] = from_disk
        elif isinstance(step, Release) and step.ring == "device":
            flight = self._left.pop(step.unit)
            assert flight.lease is not None
            flight.lease.release()
        elif isinstance(step, WriteShard) or (isinstance(step, Release) and step.ring == "cells"):
            self._run(step)

    def _download_cell(self, step: DownloadCell) -> None:
        unit = step.unit
        if unit not in self._left:  # no visit: updates alone
            self._left[unit] = self._flights[unit].popleft()
        flight = self._left[unit]
        self._bring(unit, "download")
        start = now()
        pairs = [(below, above) for above, below in self._pairs(unit, step.shards, flight.slot)]
        self._device.download_into(pairs, flight.event).wait()
        self._timeline.add("download", unit, start, now(), sum(below.numel() for below, _ in pairs))

    def _bring(self, unit: str, lane: str) -> None:
        with self._bringing[unit]:
            super()._bring(unit, lane)

    def _pairs(self, unit: str, shards: Sequence[str], slot: int | None) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """A cell's bytes there and in main memory, or those of some of its shards."""
        above, below = self._there.area(unit, slot), self._cells.area(unit)
        if not shards:
            return [(above, below)]
        found: list[tuple[int, int]] = []
        for name in shards:
            shard = self._shards[name]
            end = shard.at + shard.count * shard.dtype.itemsize
            if found and found[-1][1] == shard.at:  # they lie side by side
                found[-1] = (found[-1][0], end)
            else:
                found.append((shard.at, end))
        return [(above[start:end], below[start:end]) for start, end in found]

    def _drop(self) -> None:
        """The lanes have stopped: gives back what they hold."""
        flights = [flight for arrived in self._flights.values() for flight in arrived]
        flights += [*self._lent.values(), *self._left.values()]
        leases = [f.lease for f in flights if f.lease is not None]
        for lease in [*leases, *self._held_shards.values()]:
            lease.release()
        for table in (self._flights, self._lent, self._left, self._used, self._held_shards):
            table.clear()
        if self._updates is not None:
            self._updates.drop()
        self.put_away()
        self._device.synchronize()  # the slots are free: a device that has failed says so here again
