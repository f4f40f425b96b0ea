"""Lanes of training on an accelerator, in any order that their rules allow: each works in what was brought for it."""

from __future__ import annotations

import itertools
import random

import pytest

from offload.planner.schedule import Read, Release, Schedule, Step
from offload.planner.training import emit_training
from offload.planner.training_steps import (
    DownloadCell,
    ReadCell,
    TrainedShard,
    TrainedUnit,
    Update,
    UploadCell,
    WriteCell,
)
from offload.runtime.progress import MODEL, Progress, lanes

PASSES = 3
AHEAD = ("read", "upload")


def unit(name: str, *, stays_there: bool, keeps: bool, defers: bool, going_up: int = 0) -> TrainedUnit:
    """Travels in main memory, and computes on an accelerator, which updates the first shards."""
    shards = tuple(
        TrainedShard(
            name=f"{name}[{k}]", nbytes=12, masters_nbytes=4, stays=keeps, goes_up=k < going_up, cell_nbytes=2
        )
        for k in range(2)
    )  # fmt: skip
    return TrainedUnit(
        name=name, nbytes=2, shards=shards, stays=False, uploads=True, stays_there=stays_there, defers=defers
    )


class Holds:
    """What of main memory is held for each unit, as `WalkBeside` holds it."""

    def __init__(self, schedule: Schedule) -> None:
        self.reads = [step for step in schedule if isinstance(step, ReadCell)]
        self.arrived: dict[str, list[tuple[int, int]]] = {}  # reads that nobody has taken: pass and step
        self.held: dict[str, tuple[int, int]] = {}  # by which read

    def may(self, step: Step) -> bool:
        """Whether what a step works in is there."""
        is_bringing = isinstance(step, Update | UploadCell | DownloadCell)
        return not is_bringing or step.unit in self.held or bool(self.arrived.get(step.unit))

    def read_for(self, step: Step, number: int) -> tuple[int, int]:
        """The read that brings what a step works in: the last one of its unit before it."""
        own = [read.index for read in self.reads if read.unit == step.unit]
        before = [at for at in own if at < step.index]
        return (number, before[-1]) if before else (number - 1, own[-1])

    def do(self, step: Step, number: int) -> None:
        unit, key = step.unit, (number, step.index)
        if isinstance(step, ReadCell):
            self.arrived.setdefault(unit, []).append(key)
        elif isinstance(step, Update | UploadCell | DownloadCell):
            if unit not in self.held:
                self.held[unit] = self.arrived[unit].pop(0)
            assert self.held[unit] == self.read_for(step, number), (
                f"{step} works in what read {self.held[unit]} brought"
            )
        elif isinstance(step, WriteCell):
            del self.held[unit]
        elif isinstance(step, Release) and step.ring == "cells" and unit in self.held:  # or a write has let go of it
            assert self.held[unit] < key, f"{step} gives back what was brought for a later step"
            del self.held[unit]


def run(schedule: Schedule, choose: random.Random) -> None:
    """Passes, with the next step of any lane at a time; reads and uploads go ahead into the next pass."""
    progress, holds = Progress(), Holds(schedule)
    progress.start(schedule, 0, splits=True)
    names = lanes(schedule)
    own = {name: [s for s, n in zip(schedule, names, strict=True) if n == name] for name in set(names)}
    at = dict.fromkeys(own, 0)
    total = {name: PASSES * len(steps) for name, steps in own.items()}
    for _ in itertools.count():
        if all(at[name] == total[name] for name in own):
            return
        may = []
        for name, steps in own.items():
            number, k = divmod(at[name], len(steps))
            if at[name] == total[name] or (name not in AHEAD and progress.number < number + 1):
                continue
            if name == "read" and number + 1 > progress.number + 1:  # rings have an end
                continue
            with progress.changed:
                if progress.are_done(steps[k], number + 1) and holds.may(steps[k]):
                    may.append(name)
        assert may, "nobody can go on"
        name = choose.choice(may)
        number, k = divmod(at[name], len(own[name]))
        holds.do(own[name][k], number + 1)
        at[name] += 1
        is_over = k + 1 == len(own[name])
        progress.move(name, number + 1, len(schedule) if is_over else own[name][k].index + 1)
        others = [n for n in own if n != "read"]
        if all(at[n] >= progress.number * len(own[n]) for n in others) and progress.number < PASSES:
            progress.again()


@pytest.mark.parametrize("clips", [True, False], ids=["clip", "no clip"])
@pytest.mark.parametrize("copies", [True, False], ids=["copies", "masters"])
@pytest.mark.parametrize("stays_there", [True, False], ids=["place", "slot"])
@pytest.mark.parametrize("keeps", [True, False], ids=["state in memory", "state on disk"])
@pytest.mark.parametrize("defers", [(), (0, 1), (1,)], ids=["", "deferred", "one deferred"])
@pytest.mark.parametrize("going_up", [0, 1, 2])
def test_every_lane_works_in_what_was_brought_for_it(
    defers: tuple[int, ...], clips: bool, copies: bool, stays_there: bool, keeps: bool, going_up: int
) -> None:
    if clips and copies:
        pytest.skip("with clipping weights are never stored a second time")
    if defers and (keeps or not clips):
        pytest.skip("nothing is deferred")
    order = [
        unit(f"u{k}", stays_there=stays_there, keeps=keeps, defers=k in defers, going_up=going_up) for k in range(3)
    ]
    schedule = emit_training(
        order, None, clips=clips, is_due=clips, reads="weights" if copies else "masters", writes_copies=copies
    )
    assert any(isinstance(step, Read) for step in schedule)
    assert MODEL in lanes(schedule)
    for seed in range(70):
        run(schedule, random.Random(seed))
