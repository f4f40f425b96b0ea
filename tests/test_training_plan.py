"""The step tuple of training: who waits for whom, bytes by closed form, what stays, and what a step should take."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from offload.errors import BudgetError
from offload.planner.cells import FEWEST, plan_cells
from offload.planner.schedule import Compute, Read, Release, Schedule, Write, explain
from offload.planner.training import deferring, emit_training, has_copies, moved
from offload.planner.training_cost import both, step_cost
from offload.planner.training_steps import (
    Backward,
    Forward,
    ReadCell,
    ReadShard,
    TrainedShard,
    TrainedUnit,
    Update,
    WriteCell,
    WriteShard,
)
from offload.profile import preset

COUNT = 4096  # parameters of a shard


def unit(name: str, *, stays: bool, keeps: bool = False, shards: int = 2, defers: bool = False) -> TrainedUnit:
    """AdamW in bf16."""
    found = tuple(
        TrainedShard(name=f"{name}[{k}]", nbytes=12 * COUNT, masters_nbytes=4 * COUNT, stays=keeps)
        for k in range(shards)
    )
    return TrainedUnit(name=name, nbytes=2 * COUNT * shards, shards=found, stays=stays, defers=defers)


@st.composite
def steps(draw: st.DrawFn) -> tuple[Schedule, bool]:
    clips = draw(st.booleans())
    flags = draw(st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 3)), min_size=1, max_size=5))
    order = [unit(f"u{k}", stays=a, keeps=b, shards=c) for k, (a, b, c) in enumerate(flags)]
    loose = unit("loose", stays=True) if draw(st.booleans()) else None
    copies = has_copies(clips, 2)
    schedule = emit_training(
        order, loose, clips=clips, is_due=clips, reads="weights" if copies else "masters", writes_copies=copies
    )
    return schedule, clips


@given(steps())
def test_every_read_follows_the_last_change_and_every_slot_goes_back(case: tuple[Schedule, bool]) -> None:
    schedule, clips = case
    assert len(explain(schedule).splitlines()) == len(schedule)
    assert [s.index for s in schedule] == list(range(len(schedule)))
    assert all(a < s.index for s in schedule for a in s.after)
    slots = {"state": 0, "cells": 0}
    for _ in range(2):
        for step in schedule:
            if isinstance(step, Read):
                slots[step.ring] += 1
            elif isinstance(step, Release):
                slots[step.ring] -= 1
            assert slots["state"] in (0, 1)
            assert slots["cells"] in (0, 1)
    assert slots == {"state": 0, "cells": 0}
    for step in schedule:
        if isinstance(step, ReadShard):
            changed = [s.index for s in schedule if isinstance(s, WriteShard) and s.shard == step.shard]
            assert (*step.after, *step.behind) == tuple(changed)
        if isinstance(step, ReadCell) and step.what != "masters":
            changed = [s.index for s in schedule if isinstance(s, WriteCell) and s.unit == step.unit]
            assert step.behind == tuple(changed)
    updates = [s for s in schedule if isinstance(s, Update) and s.unit != "loose"]
    for update in updates:  # before the unit's forward where gradients are clipped, else behind its backward
        at = next(s.index for s in schedule if isinstance(s, Forward if clips else Backward) and s.unit == update.unit)
        assert (update.index < at) == clips
    visits = [s.unit for s in schedule if isinstance(s, Forward)]
    assert [s.unit for s in schedule if isinstance(s, Backward)] == visits[::-1]


@pytest.mark.parametrize(("clips", "read", "written"), [(True, 18, 14), (False, 16, 14)])
def test_bytes_of_what_travels(clips: bool, read: int, written: int) -> None:
    order = [unit(f"u{k}", stays=False) for k in range(4)]
    copies = has_copies(clips, 2)
    schedule = emit_training(
        order, None, clips=clips, is_due=clips, reads="weights" if copies else "masters", writes_copies=copies
    )
    params, last = 8 * COUNT, 2 * COUNT
    saved = last * (4 if clips else 2)  # the last unit's backward follows its forward at once
    assert moved(schedule) == (read * params - saved, written * params)
    kept = emit_training([unit(f"u{k}", stays=True) for k in range(4)], None, clips=clips, is_due=clips)
    assert moved(kept) == (12 * params, 12 * params)


def test_deferred_state_is_read_twice_and_written_in_the_backward_pass() -> None:
    order = [unit(f"u{k}", stays=k == 1, defers=True) for k in range(4)]
    schedule = emit_training(order, None, clips=True, is_due=True)
    assert "trial" not in {
        s.made for s in emit_training(order, None, clips=True, is_due=True, backward=False) if isinstance(s, Update)
    }
    backward = next(s.index for s in schedule if isinstance(s, Backward))
    writes = {s.unit for s in schedule if isinstance(s, WriteShard) and s.index > backward}
    assert writes == {"u0", "u1", "u2"}, "the last unit's backward follows at once"
    params = 2 * COUNT
    assert moved(schedule) == ((2 * 28 + 24 + 14) * params, (2 * 14 + 12 + 14) * params)
    slots = {"state": 0, "cells": 0, "aside": 0}
    for step in schedule:
        if isinstance(step, Read):
            slots[step.ring] += 1
        elif isinstance(step, Update) and step.goes_aside and step.shard.endswith("[0]"):
            assert step.unit == "u1", "others bring their gradients twice"
            slots["aside"] += 1
        elif isinstance(step, Release):
            slots[step.ring] -= 1
        assert set(slots.values()) <= {0, 1}
    assert set(slots.values()) == {0}


@given(st.lists(st.integers(0, 50), max_size=12), st.floats(0, 1))
def test_what_is_deferred_is_a_share(sizes: list[int], share: float) -> None:
    units = {f"u{k}": nbytes for k, nbytes in enumerate(sizes)}
    chosen = deferring(units, share)
    taken = sum(units[u] for u in chosen)
    assert abs(taken - share * sum(sizes)) <= max(sizes, default=0)
    assert not deferring(units, 0.0)
    assert deferring(units, 1.0) == {u for u, nbytes in units.items() if nbytes}


def test_copies_are_stored_where_that_moves_less() -> None:
    assert [has_copies(clips, size) for clips in (True, False) for size in (2, 4)] == [False, False, True, False]


@given(st.lists(st.integers(0, 50), min_size=1, max_size=12), st.integers(0, 400))
@example([5, 8, 8, 8, 5, 5, 5, 5, 0], 32)
def test_what_stays_fits(sizes: list[int], room: int) -> None:
    cells = {f"c{k}": n << 20 for k, n in enumerate(sizes)}
    room <<= 20
    try:
        plan = plan_cells(cells, room)
    except BudgetError:
        least = min(n for n in cells.values() if n)
        assert FEWEST * least + sum(cells.values()) - least > room
        return
    kept = sum(cells[c] for c in plan.kept)
    assert plan.nbytes == kept + plan.slots * plan.slot_nbytes <= room
    assert plan.travels_nbytes == sum(cells.values()) - kept
    assert all(cells[c] <= plan.slot_nbytes for c in cells if c not in plan.kept)
    assert (plan.slots == 0) == (plan.travels_nbytes == 0)
    assert all(c in plan.kept for c, n in cells.items() if not n)
    if sum(cells.values()) <= room:
        assert plan.travels_nbytes == 0


def test_what_stays_is_spread() -> None:
    cells = {f"c{k}": 64 << 20 for k in range(9)}
    plan = plan_cells(cells, (3 + 3) * (64 << 20))
    assert [c in plan.kept for c in cells] == [False, True, False, False, True, False, False, True, False]


def test_a_step_takes_its_slowest_resource_and_no_longer_than_all_of_them() -> None:
    profile = preset("cpu-ddr5-nvme4")
    order = [unit(f"u{k}", stays=False) for k in range(6)]
    schedule = emit_training(order, None, clips=True, is_due=True)
    for each in (1e-6, 1e-3, 1.0):
        cost = step_cost(
            schedule, profile, slots={"state": 8, "cells": 3}, forward_s={u.name: each for u in order},
            backward_s={u.name: 3 * each for u in order}, update_s=lambda step, each=each: each / 10,
        )  # fmt: skip
        assert cost.compute_s == pytest.approx(each * (6 * 4 + 12 / 10))
        assert cost.bound_s * 0.999 <= cost.seconds <= 1.001 * (cost.compute_s + cost.disk_s) + 1e-3
        assert cost.seconds == pytest.approx(cost.compute_s + cost.stall_s, rel=0.3, abs=1e-2)
        assert (cost.read_bytes, cost.write_bytes) == moved(schedule)
    assert cost.binding == "compute"
    computing = [s for s in schedule if isinstance(s, Compute)]
    assert len(computing) == 6 + 6 + 12
    assert sum(isinstance(s, Write) for s in schedule) == 12 + 6


def test_reads_and_writes_at_once() -> None:
    assert both(3.0, 1.0, 1.0, 1.0) == 3.0
    assert both(3.0, 1.0, 0.5, 0.5) == pytest.approx(4.0)
    assert both(1.0, 3.0, 0.5, 0.5) == pytest.approx(4.0)
    assert both(2.0, 2.0, 0.8, 0.8) == pytest.approx(2.5)
