"""Lanes of training on an accelerator, in any order that their rules allow: each sees what it sees in the tuple's."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest
from training_machine import Machine

from offload.planner.schedule import Read, Schedule
from offload.planner.training import emit_training
from offload.planner.training_steps import TrainedShard, TrainedUnit, UpdateThere
from offload.runtime.progress import MODEL, Progress, lanes

PASSES = 3
AHEAD = ("read", "upload")
ORDERS = 40


def unit(name: str, *, stays_there: bool, stays: bool, keeps: bool, defers: bool, going_up: int = 0) -> TrainedUnit:
    """Computes on an accelerator, which updates the first shards."""
    shards = tuple(
        TrainedShard(
            name=f"{name}[{k}]", nbytes=12, masters_nbytes=4, stays=keeps, goes_up=k < going_up, cell_nbytes=2
        )
        for k in range(2)
    )  # fmt: skip
    return TrainedUnit(
        name=name, nbytes=2, shards=shards, stays=stays, uploads=True, stays_there=stays_there, defers=defers
    )


def run(machine: Machine, schedule: Schedule, choose: random.Random) -> None:
    """Passes, with the next step of any lane at a time; reads and uploads go ahead into the next pass."""
    progress = Progress()
    progress.start(schedule, 0, splits=True)
    names = lanes(schedule)
    own = {name: [s for s, n in zip(schedule, names, strict=True) if n == name] for name in set(names)}
    order = sorted(own)
    at = dict.fromkeys(order, 0)
    total = {name: PASSES * len(steps) for name, steps in own.items()}
    for _ in itertools.count():
        if all(at[name] == total[name] for name in order):
            return
        may = []
        for name in order:
            steps = own[name]
            number, k = divmod(at[name], len(steps))
            if at[name] == total[name] or (name not in AHEAD and progress.number < number + 1):
                continue
            if name == "read" and number + 1 > progress.number + 1:  # rings have an end
                continue
            with progress.changed:
                if progress.are_done(steps[k], number + 1) and machine.may(steps[k]):
                    may.append(name)
        assert may, "nobody can go on"
        name = choose.choice(may)
        number, k = divmod(at[name], len(own[name]))
        machine.do(own[name][k], number + 1)
        at[name] += 1
        is_over = k + 1 == len(own[name])
        progress.move(name, number + 1, len(schedule) if is_over else own[name][k].index + 1)
        others = [n for n in own if n != "read"]
        if all(at[n] >= progress.number * len(own[n]) for n in others) and progress.number < PASSES:
            progress.again()


def in_order(machine: Machine, schedule: Schedule) -> None:
    """The same, one step after the other: the definition of correct."""
    for number in range(1, PASSES + 1):
        for step in schedule:
            assert machine.may(step), step
            machine.do(step, number)


def cases() -> Iterator[Any]:
    """Whatever goes together, with a name that says what it is."""
    defers = {"": (), "deferred": (0, 1), "one deferred": (1,)}
    for going_up, late, *flags in itertools.product(range(3), defers, *[(True, False)] * 5):
        clips, copies, stays_there, stays, keeps = flags
        if copies and (clips or stays):
            continue  # weights are stored a second time without clipping only, and where they travel
        if late and (keeps or not clips):
            continue  # state in memory is not written, and without clipping nothing is deferred
        words = [
            f"{going_up} there", "clip" if clips else "no clip", "copies" if copies else "masters",
            "place" if stays_there else "slot", "stays" if stays else "travels",
            "state in memory" if keeps else "state on disk", late,
        ]  # fmt: skip
        yield pytest.param(going_up, defers[late], *flags, id=", ".join(word for word in words if word))


@pytest.mark.parametrize(("going_up", "defers", "clips", "copies", "stays_there", "stays", "keeps"), list(cases()))
def test_every_lane_works_in_what_was_brought_for_it(
    going_up: int,
    defers: tuple[int, ...],
    clips: bool,
    copies: bool,
    stays_there: bool,
    stays: bool,
    keeps: bool,
) -> None:
    places = {"stays_there": stays_there, "stays": stays, "keeps": keeps}
    order = [unit(f"u{k}", **places, defers=k in defers, going_up=going_up) for k in range(3)]
    schedule = emit_training(
        order, None, clips=clips, is_due=clips, reads="weights" if copies else "masters", writes_copies=copies,
        holds_there=any(u.rests_there for u in order),
    )  # fmt: skip
    assert any(isinstance(step, Read) for step in schedule) == (not (stays and keeps))
    assert any(isinstance(step, UpdateThere) for step in schedule) == bool(going_up)
    assert MODEL in lanes(schedule)
    right = Machine(order, schedule)
    in_order(right, schedule)
    assert right.is_at_rest
    for seed in range(ORDERS):
        machine = Machine(order, schedule)
        run(machine, schedule, random.Random(seed))
        for (number, index), values in right.seen.items():
            found = machine.seen[number, index]
            assert found == values, f"{schedule[index]} of pass {number} works with {found}, not {values}"
        assert machine.is_at_rest
