"""The compute lane of training: the model's thread walks the step tuple from one unit's visit to the next.

What lies between two visits is done on the way: updates, writes that are begun, slots that go back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from offload.io.buffers import Lease
from offload.planner.schedule import Release, Schedule, Step
from offload.planner.training_steps import Backward, Forward, Update, WriteCell, WriteShard
from offload.runtime.parameters import Parameters
from offload.runtime.progress import MODEL
from offload.runtime.timeline import Timeline, now
from offload.runtime.training_lanes import TrainingLanes
from offload.tiers.cells import Cells, Shard
from offload.tiers.host import as_tensor


class Rule(Protocol):
    """An optimizer, as far as it is needed here; see offload.optim."""

    def state_nbytes(self, shape: tuple[int, ...]) -> int: ...
    def start(self, state: torch.Tensor, weights: torch.Tensor) -> None: ...
    def step(self, state: torch.Tensor, cell: torch.Tensor, numbers: Any, *, decays: bool) -> None: ...
    def weights(self, state: torch.Tensor, cell: torch.Tensor) -> None: ...


class Walk:
    """Where the model is in the tuple, and what it holds there.

    Attributes:
        numbers: of the optimizer's step that updates apply.
        generation: the step that they lead to.
    """

    _updating = MODEL  # the lane that does updates

    def __init__(
        self, cells: Cells, lanes: TrainingLanes, parameters: Parameters, rule: Rule, timeline: Timeline
    ) -> None:
        self._cells, self._lanes, self._parameters, self._rule = cells, lanes, parameters, rule
        self._timeline = timeline
        self._shards: dict[str, Shard] = {s.name: s for cell in cells.layouts.values() for s in cell.shards}
        self._schedule: Schedule = ()
        self._at = 0  # the step that comes next
        self._held_shards: dict[str, Lease] = {}
        self._held_cells: dict[str, Lease] = {}
        self._asides: dict[str, Lease] = {}  # of cells that stay and whose weights are elsewhere
        self._entered = 0.0
        self.numbers: Any = None
        self.generation = 0

    def begin(self, schedule: Schedule, *, repeats: bool, at: int = 0) -> None:
        """A pass begins; see TrainingLanes.begin."""
        self.put_away()
        self._schedule, self._at = schedule, at
        self._lanes.begin(schedule, repeats=repeats, at=at)

    def is_before(self, unit: str, *, is_backward: bool) -> bool:
        """Runs the steps up to the next visit; whether it is this one. What is not trained need not be visited."""
        while self._at < len(self._schedule):
            step = self._schedule[self._at]
            if isinstance(step, Forward | Backward):
                is_this = step.unit == unit and isinstance(step, Backward) == is_backward
                if is_this or self._cells.layouts[step.unit].places:
                    return is_this
            self._do(step)
        return False

    def enter(self, unit: str) -> None:
        """The visit that comes next begins: the unit's parameters are its weights."""
        if not self._cells.stays(unit):
            self._bring(unit, MODEL)
        if not self._cells.stays(unit) or unit in self._asides:
            self._show(unit)
        self._entered = now()

    def turn(self, unit: str) -> None:
        """A backward has run. That of the last unit of a forward pass follows at once, without entering anew."""
        step = self._schedule[self._at]
        if isinstance(step, Forward) and step.unit == unit:
            self._next()

    def leave(self, unit: str) -> None:
        """The visit ends: runs the steps behind it that concern the unit."""
        step = self._schedule[self._at]
        name = "backward" if isinstance(step, Backward) else "forward"
        self._timeline.add("compute", f"{name} {unit}", self._entered, now())
        self._entered = now()
        self._next()
        while self._at < len(self._schedule):
            step = self._schedule[self._at]
            if step.unit != unit or isinstance(step, Forward | Backward):
                break
            self._do(step)

    def finish(self) -> None:
        """Runs what is left of the tuple: updates that no visit of a unit leads to."""
        skips = False
        while self._at < len(self._schedule):
            step = self._schedule[self._at]
            is_visit = isinstance(step, Forward | Backward) and bool(self._cells.layouts[step.unit].places)
            skips = skips or is_visit
            self._do(step)
        if skips:
            self._lanes.rest()  # what was read for visits that were not made

    def state_of(self, name: str, view: memoryview) -> torch.Tensor:
        """A shard's state without what fills its last page."""
        return as_tensor(view)[: self._rule.state_nbytes(self._shards[name].shape)]

    def lend(self, unit: str, lease: Lease) -> None:
        """A cell that travels lies in this slot until it is let go."""
        self._held_cells[unit] = lease
        self._cells.lend(unit, lease.view)

    def let_go(self, unit: str) -> Lease:
        """Ends that; the slot may be released or written."""
        self._parameters.hide(self._cells.layouts[unit].places)
        self._cells.take_back(unit)
        return self._held_cells.pop(unit)

    def put_away(self) -> None:
        """Lets go of every cell that was lent between passes, or in one that failed."""
        for unit in list(self._held_cells):
            self.let_go(unit).release()
        for unit in list(self._asides):
            self._end_aside(unit)

    # Steps.

    def _do(self, step: Step) -> None:
        self._run(step)
        self._next()

    def _run(self, step: Step) -> None:
        """What is not a visit."""
        if isinstance(step, Update):
            self._update(step)
        elif isinstance(step, WriteShard):
            self._lanes.writes.give_shard(step.shard, self._held_shards.pop(step.shard), self.generation)
        elif isinstance(step, WriteCell):
            self._lanes.writes.give_cell(step.unit, self.let_go(step.unit))
        elif isinstance(step, Release) and step.ring == "cells" and step.unit in self._held_cells:
            self.let_go(step.unit).release()  # behind a write, its end does it
        elif isinstance(step, Release) and step.ring == "aside":
            self._end_aside(step.unit)
            self._show(step.unit)
        elif isinstance(step, Release) and step.ring == "state":
            source = self._schedule[step.after[0]]
            if isinstance(source, Update):  # a trial; nobody writes it
                self._held_shards.pop(source.shard).release()

    def _next(self) -> None:
        self._at += 1
        self._lanes.done(self._at)

    def _update(self, step: Update) -> None:
        """Gradient and state of a shard become weights and state."""
        if step.goes_aside and step.unit not in self._asides:
            assert self._lanes.rings.aside is not None
            self._asides[step.unit] = lent = self._lanes.rings.aside.lease()
            self._cells.lend(step.unit, lent.view)
        self._bring(step.unit, self._updating)
        shard = self._shards[step.shard]
        view, lease = self._lanes.reads.take_shard(shard.name, self._updating)
        start = now()
        state, cell = self.state_of(shard.name, view), self._cells.shard(shard)
        if step.goes_aside:
            cell.copy_(self._cells.own(shard))
        if step.made == "rounding":
            self._rule.weights(state, cell)
        else:
            self._rule.step(state, cell, self.numbers, decays=shard.decays)
        self._timeline.add("update", shard.name, start, now(), len(view))
        if lease is None:
            self._lanes.kept.dirty.add(shard.name)
        else:
            self._held_shards[shard.name] = lease

    def _end_aside(self, unit: str) -> None:
        """A cell that stays is in its own memory again."""
        self._cells.take_back(unit)
        self._asides.pop(unit).release()

    def _show(self, unit: str) -> None:
        self._parameters.show({n: self._cells.views[n] for n in self._cells.layouts[unit].places})

    def _bring(self, unit: str, lane: str) -> None:
        """Waits, in a lane, for a cell that travels, where it is not here yet."""
        if not self._cells.has(unit):
            self.lend(unit, self._lanes.reads.take_cell(unit, lane))


class LazyWeights(Mapping[str, torch.Tensor]):
    """Weights by name, brought in as they are asked for. A tensor is good until the next one is asked for."""

    def __init__(self, cells: Cells, bring: Callable[[str], None]) -> None:
        self._cells, self._bring = cells, bring
        self._units = {name: unit for unit, cell in cells.layouts.items() for name in cell.places}

    def __getitem__(self, name: str) -> torch.Tensor:
        self._bring(self._units[name])
        return self._cells.views[name]

    def __iter__(self) -> Any:
        return iter(self._units)

    def __len__(self) -> int:
        return len(self._units)
