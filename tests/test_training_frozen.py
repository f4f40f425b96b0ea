"""Tuples of adapters beside frozen weights and of zeroth-order steps: who waits for whom, bytes and seconds."""

from __future__ import annotations

import pytest

from offload.finetune.pricing import Visit, move_s
from offload.planner.placement import NO_RING, Placement, Ring, Tier
from offload.planner.schedule import Download, Read, Release, Schedule, Step, Upload, Write, explain
from offload.planner.training import emit_training, moved
from offload.planner.training_cost import StepCost, mean_cost, replay_step
from offload.planner.training_frozen import with_frozen
from offload.planner.training_stash import ReadInputs, WriteInputs, with_inputs
from offload.planner.training_steps import Backward, Forward, ReadShard, TrainedShard, TrainedUnit, Update, WriteShard
from offload.planner.zeroth import Both, Move, WriteBack, emit_zeroth, rhythm
from offload.profile import preset
from offload.runtime.writeback import WriteBack as Rhythm
from offload.specs import TensorSpec

SIZE = 1000  # bytes of a frozen weight that streams; each unit has another
UNITS = ("a", "b", "c", "d")
STREAM = ("a", "c", "d")


def placement(*, uploads: bool = False) -> Placement:
    """Of b everything stays; of the others a weight streams."""
    weights = {
        unit: TensorSpec(name=f"{unit}.w", nbytes=SIZE + k, read_nbytes=SIZE + k, slot_nbytes=SIZE + k)
        for k, unit in enumerate(UNITS)
    }
    home = {f"{u}.w": Tier.DISK if u in STREAM else Tier.DEVICE if uploads else Tier.HOST for u in UNITS}
    ring = Ring(2, 2 * SIZE)
    bundles = {u: (weights[u],) for u in STREAM}
    there = ring if uploads else NO_RING
    return Placement(home=home, tables=frozenset(), host_ring=ring, device_ring=there, bundles=bundles)


def trained(*, clips: bool, uploads: bool) -> Schedule:
    """Adapters in every unit but a, whose state streams."""
    units = [
        TrainedUnit(
            name=u, nbytes=64, uploads=uploads, stays_there=True,
            shards=() if u == "a" else (TrainedShard(name=f"{u}[0]", nbytes=384, masters_nbytes=128),),
        )
        for u in UNITS
    ]  # fmt: skip
    return emit_training(units, None, clips=clips, is_due=clips)


@pytest.mark.parametrize("uploads", [False, True])
@pytest.mark.parametrize("clips", [False, True])
def test_frozen_weights_come_for_every_visit_and_go_behind_it(clips: bool, uploads: bool) -> None:
    plain, place = trained(clips=clips, uploads=uploads), placement(uploads=uploads)
    schedule = with_frozen(plain, place)
    assert [s.index for s in schedule] == list(range(len(schedule)))
    assert len(explain(schedule).splitlines()) == len(schedule)
    reads = [s for s in schedule if isinstance(s, Read) and s.ring == "host"]
    assert [s.unit for s in reads] == ["a", "c", "d", "c", "a"], "the last unit's forward and backward are one visit"
    assert moved(schedule)[0] == moved(plain)[0] + sum(s.nbytes for s in reads) == 3 * 384 + 5 * SIZE + 7
    visits = [s for s in schedule if isinstance(s, Forward | Backward) and s.unit in STREAM]
    for visit in visits:
        before = [schedule[k] for k in visit.after if isinstance(schedule[k], Upload if uploads else Read)]
        assert {s.unit for s in before} == {visit.unit}
    free = {"host": 2, "device": 2, "state": 1}
    for step in schedule:  # as many slots as there are, and each goes back
        if isinstance(step, Read | Upload) and step.ring:
            free[step.ring] -= 1
        elif isinstance(step, Release):
            free[step.ring] += 1
        assert min(free.values()) >= 0
    assert free == {"host": 2, "device": 2, "state": 1}

    def what(steps: Schedule) -> list[tuple[object, ...]]:
        """Steps of training, by what they wait for rather than where it stands."""
        own = [s for s in steps if not (isinstance(s, Read | Upload | Release) and s.ring in ("host", "device"))]
        places = {s.index: k for k, s in enumerate(own)}
        return [
            (type(s), s.unit, [places[k] for k in s.after if k in places], [places[k] for k in s.behind]) for s in own
        ]

    assert what(schedule) == what(plain)


def test_a_step_beside_frozen_weights_takes_what_binds() -> None:
    profile = preset("cpu-ddr5-nvme4")
    schedule = with_frozen(trained(clips=True, uploads=False), placement())

    def seconds(step: Step) -> float:
        if isinstance(step, Read):
            return 0.01 if isinstance(step, ReadShard) else 1.0
        return 0.25 if isinstance(step, Forward | Backward) else 0.0

    found = replay_step(schedule, profile, seconds, {"host": 2, "state": 2})
    assert found.seconds == pytest.approx(5.03, rel=0.1), "five reads of a second, one after the other"
    assert found.compute_s == pytest.approx(2.0)


@pytest.mark.parametrize(("uploads", "is_beside"), [(False, False), (True, False), (True, True)])
def test_a_zeroth_step_moves_sends_and_runs(uploads: bool, is_beside: bool) -> None:
    order = [(unit, 10 * (k + 1)) for k, unit in enumerate(UNITS)]
    schedule = emit_zeroth(order, placement(), uploads=uploads, is_beside=is_beside, writes_back=True)
    assert [s.index for s in schedule] == list(range(len(schedule)))
    assert [s.unit for s in schedule if isinstance(s, Move)] == [s.unit for s in schedule if isinstance(s, Both)]
    assert moved(schedule) == (3 * SIZE + 5, 3 * SIZE + 5)
    assert sum(s.nbytes for s in schedule if isinstance(s, Upload)) == (2 * 100 if uploads else 0)
    assert sum(isinstance(s, Release) for s in schedule) == 3

    def seconds(step: Step) -> float:
        return {Move: 2.0, Both: 1.0, Upload: 0.5, Read: 0.0, WriteBack: 0.0}[type(step)]

    found = replay_step(schedule, preset("cpu-ddr5-nvme4"), seconds, {"host": 2})
    if is_beside:  # a unit moves while the one before it runs; the first when all losses are known
        assert found.seconds == pytest.approx(4 * 2.5 + 1.0, rel=0.01)
    else:
        assert found.seconds == pytest.approx(4 * (3.5 if uploads else 3.0), rel=0.01)


def test_a_pass_that_writes_waits_for_it() -> None:
    order = [(unit, 10) for unit in UNITS]

    def seconds(step: Step) -> float:
        return 2.0 if isinstance(step, Write) else 0.5 if isinstance(step, Both) else 0.0

    for writes, expected in ((False, 2.0), (True, 6.5)):
        schedule = emit_zeroth(order, placement(), writes_back=writes)
        found = replay_step(schedule, preset("cpu-ddr5-nvme4"), seconds, {"host": 2})
        assert found.seconds >= expected
        assert found.write_bytes == (3 * SIZE + 5 if writes else 0)


def test_the_rhythm_is_that_of_the_run() -> None:
    def pace(every: int | None = None) -> int | None:
        rule = Rhythm(1000, every)
        rule.add_writes(10.0)
        return rhythm(rule.is_due, lambda updates: rule.add_pass(float(updates)), 100)

    # Passes of 1, 2, 3, 4 seconds, and 4 more to come, are 14: the first sum that is 10 or more.
    assert pace() == 5
    assert pace(7) == 7
    assert rhythm(lambda updates: False, lambda updates: None, 100) is None


def test_the_mean_of_steps() -> None:
    def cost(seconds: float, written: int) -> StepCost:
        return StepCost(seconds=seconds, compute_s=1.0, disk_s=0.0, stall_s=0.0, read_bytes=8, write_bytes=written)

    found = mean_cost([(cost(1.0, 0), 3), (cost(5.0, 100), 1)])
    assert (found.seconds, found.compute_s, found.read_bytes, found.write_bytes) == (2.0, 1.0, 8, 25)


@pytest.mark.parametrize("clips", [False, True])
def test_inputs_on_disk_are_written_and_read_once(clips: bool) -> None:
    plain = trained(clips=clips, uploads=False)
    schedule = with_inputs(plain, {"a": 10, "b": 20, "c": 30, "d": 40})
    assert [s.index for s in schedule] == list(range(len(schedule)))
    assert [(s.unit, s.nbytes) for s in schedule if isinstance(s, WriteInputs)] == [("a", 10), ("b", 20), ("c", 30)]
    reads = [s for s in schedule if isinstance(s, ReadInputs)]
    assert [s.unit for s in reads] == ["c", "b", "a"], "the last unit's backward follows its forward"
    for read in reads:
        assert isinstance(schedule[read.after[0]], WriteInputs)
        backward = next(s for s in schedule if isinstance(s, Backward) and s.unit == read.unit)
        assert read.index in backward.after
    assert moved(schedule) == tuple(n + 60 for n in moved(plain))

    def seconds(step: Step) -> float:
        return 1.0 if isinstance(step, WriteInputs | ReadInputs) else 0.5 if isinstance(step, Forward) else 0.0

    found = replay_step(schedule, preset("cpu-ddr5-nvme4"), seconds, {"stash": 2, "state": 4})
    assert 4.0 <= found.seconds <= 8.0, "the last write is read first, and all else beside"


def test_moving_weights_costs_a_direction_each_and_a_backward_pass_more_than_a_forward() -> None:
    profile = preset("cpu-ddr5-nvme4")
    seconds = [move_s(1 << 24, directions, profile, "bfloat16") for directions in (1, 3, 7)]
    assert seconds[2] - seconds[1] == pytest.approx(2 * (seconds[1] - seconds[0]), rel=0.01)
    assert move_s(0, 1, profile, "bfloat16") == 0
    visit = Visit(products_s=2.0, rest_s=1.0)
    assert visit.seconds == 3.0
    assert visit.backward_s(trains=False) == 4.0, "half of the products' gradients are not wanted"
    assert visit.backward_s(trains=True) > 2 * visit.seconds


def test_downloads_and_updates_are_those_of_training() -> None:
    schedule = with_frozen(trained(clips=True, uploads=True), placement(uploads=True))
    assert {s.unit for s in schedule if isinstance(s, Download)} == {"b", "c", "d"}
    assert {s.unit for s in schedule if isinstance(s, Update | WriteShard)} == {"b", "c", "d"}
