"""Placement, schedule and virtual clock: numbers only, no tensors, no files."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.errors import BudgetError
from offload.planner.bound import bound
from offload.planner.placement import Tier, place, split
from offload.planner.schedule import Compute, Read, Step, Upload, emit, explain
from offload.planner.virtual import replay
from offload.specs import ModelSpec, TensorSpec, UnitSpec

MB = 1_000_000


def tensor(name: str, nbytes: int, is_table: bool = False) -> TensorSpec:
    return TensorSpec(name=name, nbytes=nbytes, read_nbytes=nbytes, slot_nbytes=nbytes + 8192, is_table=is_table)


def block(k: int, sizes: tuple[int, ...] = (19, 6, 6, 19, 50, 50, 50)) -> UnitSpec:
    parts = [tensor(f"block{k}.{i}", n * MB) for i, n in enumerate(sizes)]
    return UnitSpec(name=f"block{k}", tensors=(*parts, tensor(f"block{k}.norm", 6000)))


def decoder(blocks: int = 28) -> ModelSpec:
    table = UnitSpec(name="embed", tensors=(tensor("embed.weight", 197 * MB, is_table=True),))
    head = UnitSpec(name="head", tensors=(tensor("head.weight", 197 * MB),))
    return ModelSpec(units=(table, *map(block, range(blocks)), head))


@given(st.integers(650, 5900), st.sampled_from([None, 1, 2, 3]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_split_keeps_its_promise(capacity: int, slots: int | None) -> None:
    """It fits, loses nothing, and streams little more than what cannot be kept."""
    spec = decoder()
    found = split(spec.units, capacity * MB, slots=slots)
    everything = {t.name: t for u in spec.units for t in u.tensors}
    streamed = {t.name for ts in found.streamed.values() for t in ts}
    assert set(everything) == found.resident | streamed | found.tables
    assert len(everything) == len(found.resident) + len(streamed) + len(found.tables)
    kept = sum(everything[n].nbytes for n in found.resident)
    assert kept + found.ring.nbytes <= capacity * MB
    assert all(sum(t.slot_nbytes for t in ts) <= found.ring.slot_nbytes for ts in found.streamed.values())
    unused = capacity * MB - kept - found.ring.nbytes
    assert not found.streamed or unused < 60 * MB, "a whole tensor more could have stayed"


def test_streaming_is_spread_evenly() -> None:
    found = split(decoder().units, 3600 * MB, slots=2)
    sizes = [sum(t.nbytes for t in found.streamed.get(f"block{k}", ())) for k in range(28)]
    assert max(sizes) - min(sizes) <= 20 * MB
    assert found.ring.slot_nbytes < 100 * MB, "spreading keeps the slots small"
    assert not found.streamed.get("head"), "a head as large as two blocks' share would need a slot of its own"


def test_more_memory_never_streams_more() -> None:
    moved = [
        sum(t.nbytes for ts in split(decoder().units, c * MB, slots=2).streamed.values() for t in ts)
        for c in range(500, 6000, 100)
    ]
    assert all(b <= a + 60 * MB for a, b in itertools.pairwise(moved))
    assert moved[-1] == 0


def test_too_little_is_refused_with_what_would_do() -> None:
    with pytest.raises(BudgetError, match="needs at least"):
        split(decoder().units, 50 * MB, slots=2)


def test_a_target_is_kept() -> None:
    spec = decoder()
    for target in (0, 1000 * MB, 3000 * MB):
        found = place(spec, host_nbytes=20_000 * MB, host_target=target, slots=2)
        assert sum(t.nbytes for u in spec.units for t in u.tensors if found.home[t.name] is Tier.HOST) <= target


def test_three_tiers() -> None:
    spec = decoder()
    found = place(spec, host_nbytes=2500 * MB, device_nbytes=2000 * MB, slots=2)
    sizes = {tier: sum(t.nbytes for u in spec.units for t in u.tensors if found.home[t.name] is tier) for tier in Tier}
    assert sizes[Tier.DEVICE] + found.device_ring.nbytes <= 2000 * MB
    assert sizes[Tier.HOST] + found.host_ring.nbytes <= 2500 * MB
    assert min(sizes.values()) > 0


def steps_of(spec: ModelSpec, **memory: int) -> tuple[tuple[Step, ...], dict[str, int]]:
    placement = place(spec, slots=2, **memory)
    schedule = emit([(u.name, u.nbytes) for u in spec.units[1:]], placement)
    return schedule, {"host": placement.host_ring.slots, "device": placement.device_ring.slots}


def test_steps_name_what_they_follow() -> None:
    schedule, _ = steps_of(decoder(3), host_nbytes=500 * MB, device_nbytes=500 * MB)
    assert [s.index for s in schedule] == list(range(len(schedule)))
    assert all(a < s.index for s in schedule for a in s.after)
    assert {type(s).__name__ for s in schedule} == {"Read", "Upload", "Compute", "Release"}
    assert len(explain(schedule).splitlines()) == len(schedule)


@pytest.mark.parametrize(("read", "compute"), [(3.0, 1.0), (1.0, 3.0), (2.0, 2.0)])
def test_two_slots_reach_the_bound(read: float, compute: float) -> None:
    """Closed form of a double-buffered chain: fill + (n - 1) * max + drain."""
    schedule, slots = steps_of(decoder(8), host_nbytes=700 * MB)
    reads = sum(isinstance(s, Read) for s in schedule)
    assert reads == 8
    cost = {Read: read, Compute: compute}
    lean = tuple(s for s in schedule if s.unit != "head")
    events = replay(lean, lambda s: cost.get(type(s), 0.0), slots=slots, passes=2)
    assert max(e.end for e in events) == read + 15 * max(read, compute) + compute


def test_one_slot_overlaps_nothing() -> None:
    schedule, _ = steps_of(decoder(8), host_nbytes=700 * MB)
    lean = tuple(s for s in schedule if s.unit != "head")
    events = replay(lean, lambda s: 1.0 if isinstance(s, Read | Compute) else 0.0, slots={"host": 1})
    assert max(e.end for e in events) == 16


def test_the_slowest_lane_decides() -> None:
    schedule, slots = steps_of(decoder(12), host_nbytes=1200 * MB, device_nbytes=600 * MB)
    cost = {Read: 1.0, Upload: 1.5, Compute: 0.5}
    events = replay(schedule, lambda s: cost.get(type(s), 0.0), slots=slots, passes=4)
    uploads = sum(isinstance(e.step, Upload) for e in events)
    assert max(e.end for e in events) <= uploads * 1.5 + 5


def test_bound_takes_the_largest_term() -> None:
    found = bound(read_bytes=3e9, disk_bytes_per_s=3e9, upload_bytes=4e9, link_bytes_per_s=2e9, compute_s=0.5)
    assert (found.seconds, found.binding) == (2.0, "link")
    assert bound(read_bytes=1, disk_bytes_per_s=None).seconds == 0
