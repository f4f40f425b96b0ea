"""What the lanes of training on an accelerator do to bytes, a step at a time and in any order: values without bytes.

Every cell, shard of state and slot holds names of the values that a run would have there, so that whoever works in
bytes that were not brought for it, or that another has overwritten, sees another name than in the tuple's own order.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any

from offload.planner.cells import FEWEST
from offload.planner.schedule import Release, Schedule, Step
from offload.planner.training_steps import (
    Backward,
    DownloadCell,
    DownloadShard,
    Forward,
    ReadCell,
    ReadShard,
    TrainedUnit,
    Update,
    UpdateThere,
    UploadCell,
    UploadShard,
    WriteCell,
    WriteShard,
)
from offload.tiers.device_state import SLOTS

Value = Any  # the pass and the step that made it, or what was there before the first one
Values = dict[str, Value]  # by shard


class Machine:
    """Main memory, disk and accelerator, as `WalkBeside` and `UpdatesThere` use them.

    Attributes:
        seen: (pass, step) -> the values that it worked with.
    """

    def __init__(self, units: Sequence[TrainedUnit], schedule: Schedule, asides: int = 2) -> None:
        self._schedule = schedule
        self._units = {u.name: u for u in units}
        self._shards = {u.name: tuple(s.name for s in u.shards) for u in units}
        self._kept = {s.name for u in units for s in u.shards if s.stays}
        self._last = units[-1].name
        self.seen: dict[tuple[int, int], Value] = {}
        self._state: Values = {s.name: "state" for u in units for s in u.shards}  # in memory, or on disk
        self._stored = {u.name: dict.fromkeys(self._shards[u.name], "stored") for u in units}
        self._host = {u.name: dict.fromkeys(self._shards[u.name], "cell") for u in units if u.stays}
        self._arrived: dict[str, deque[Any]] = defaultdict(deque)  # of a cell, or of a shard's state
        self._held: Values = {}  # state in slots of main memory
        self._asides: dict[str, Values] = {}
        self._aside_slots = asides
        # The accelerator.
        self._free = FEWEST
        self._places = {u.name: dict.fromkeys(self._shards[u.name], "place") for u in units if u.stays_there}
        self._flights: dict[str, deque[Values]] = defaultdict(deque)
        self._lent: dict[str, Values] = {}
        self._left: dict[str, Values] = {}
        self._free_state = SLOTS
        self._above: Values = {}

    @property
    def is_at_rest(self) -> bool:
        """Whether every slot for state has gone back."""
        return self._free_state == SLOTS and not self._above and not self._held

    def may(self, step: Step) -> bool:
        """Whether what a step waits for, beside other steps, is there."""
        brings = isinstance(step, Update | UploadCell | DownloadCell)
        if brings and step.unit not in self._host and not self._arrived[step.unit]:
            return False
        if isinstance(step, Update | UploadShard) and step.shard not in self._kept and not self._arrived[step.shard]:
            return False
        if isinstance(step, Update) and step.goes_aside and step.unit not in self._asides:
            return len(self._asides) < self._aside_slots
        if isinstance(step, UploadCell) and step.ring is not None:
            return self._free > 0
        return not isinstance(step, UploadShard) or self._free_state > 0

    def do(self, step: Step, number: int) -> None:
        """The step, in that pass."""
        getattr(self, f"_{type(step).__name__.lower()}")(step, (number, step.index))

    # Main memory and disk.

    def _readcell(self, step: ReadCell, made: Value) -> None:
        found = {
            "masters": {s: self._state[s] for s in self._shards[step.unit]},
            "nothing": dict.fromkeys(self._shards[step.unit], made),
        }.get(step.what, dict(self._stored[step.unit]))
        self.seen[made] = found if step.what != "nothing" else None
        self._arrived[step.unit].append(dict(found))

    def _readshard(self, step: ReadShard, made: Value) -> None:
        self.seen[made] = self._state[step.shard]
        self._arrived[step.shard].append(self._state[step.shard])

    def _cell(self, unit: str) -> Values:
        """A cell in main memory, waited for."""
        if unit not in self._host:
            self._host[unit] = self._arrived[unit].popleft()
        return self._host[unit]

    def _take(self, shard: str) -> Value:
        return self._state[shard] if shard in self._kept else self._arrived[shard].popleft()

    def _update(self, step: Update, made: Value) -> None:
        cell, state = self._cell(step.unit), self._take(step.shard)
        target = self._asides.setdefault(step.unit, {}) if step.goes_aside else cell
        self.seen[made] = (cell[step.shard], state)
        new = state if step.made == "rounding" else made
        target[step.shard] = new
        if step.shard in self._kept:
            self._state[step.shard] = new
        else:
            assert step.shard not in self._held
            self._held[step.shard] = new

    def _writeshard(self, step: WriteShard, made: Value) -> None:
        self._state[step.shard] = self.seen[made] = self._held.pop(step.shard)

    def _writecell(self, step: WriteCell, made: Value) -> None:
        self._stored[step.unit] = self.seen[made] = self._host.pop(step.unit)

    def _release(self, step: Release, made: Value) -> None:
        source = self._schedule[step.after[0]] if step.after else None
        if step.ring == "cells":
            if step.unit in self._host:  # or a write has let go of it
                self.seen[made] = self._host.pop(step.unit)
        elif step.ring == "aside":
            del self._asides[step.unit]
        elif step.ring == "state" and isinstance(source, Update):
            del self._held[source.shard]
        elif step.ring == "device":
            del self._left[step.unit]
            self._free += 1
            assert self._free <= FEWEST

    # The accelerator.

    def _uploadcell(self, step: UploadCell, made: Value) -> None:
        cell = self._cell(step.unit)
        source = {**cell, **self._asides.get(step.unit, {})}
        flights = self._flights[step.unit]
        if step.ring is not None:
            self._free -= 1
            target: Values = {}
        else:
            target = flights[-1] if flights else self._places[step.unit]
        moved = {s: source[s] for s in step.shards or self._shards[step.unit]}
        self.seen[made] = moved
        target.update(moved)
        if step.ring is not None or not flights:
            flights.append(target)

    def _forward(self, step: Forward, made: Value) -> None:
        self._visit(step.unit)
        self.seen[made] = dict(self._lent[step.unit])
        if step.unit != self._last:  # its backward follows at once
            self._left[step.unit] = self._lent.pop(step.unit)

    def _backward(self, step: Backward, made: Value) -> None:
        if step.unit not in self._lent:
            self._visit(step.unit, is_backward=True)
        cell = self._lent.pop(step.unit)
        self.seen[made] = dict(cell)
        cell.update(dict.fromkeys(cell, made))
        self._left[step.unit] = cell

    def _visit(self, unit: str, *, is_backward: bool = False) -> None:
        flights = self._flights[unit]
        is_place = (is_backward and unit in self._places) or not flights
        self._lent[unit] = self._places[unit] if is_place else flights.popleft()

    def _uploadshard(self, step: UploadShard, made: Value) -> None:
        assert step.shard not in self._above
        self._free_state -= 1
        self._above[step.shard] = self.seen[made] = self._take(step.shard)

    def _updatethere(self, step: UpdateThere, made: Value) -> None:
        flights = self._flights[step.unit]
        cell = self._left.get(step.unit) or (flights[0] if flights else self._places[step.unit])
        self.seen[made] = (cell[step.shard], self._above[step.shard])
        cell[step.shard] = self._above[step.shard] = made

    def _downloadshard(self, step: DownloadShard, made: Value) -> None:
        state = self.seen[made] = self._above.pop(step.shard)
        self._free_state += 1
        if step.shard in self._kept:
            self._state[step.shard] = state
        else:
            self._held[step.shard] = state

    def _downloadcell(self, step: DownloadCell, made: Value) -> None:
        if step.unit not in self._left:  # no visit: updates alone
            self._left[step.unit] = self._flights[step.unit].popleft()
        cell = self._left[step.unit]
        moved = {s: cell[s] for s in step.shards or self._shards[step.unit]}
        self.seen[made] = moved
        self._cell(step.unit).update(moved)
