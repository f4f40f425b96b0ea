"""Prices of steps and predictions: closed forms on made-up machines. Numbers only."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_schedule import MB, decoder

from offload.plan.machine import BELIEVED, MOST_CHANGE, with_product_rate
from offload.planner.ops import FEW, OpCosts, Phase, decode, prefill
from offload.planner.placement import Tier, place
from offload.planner.predict import Computer, Pricer
from offload.profile import CopyRate, Curve, Lane, OpTable, Processor, Profile, preset, presets
from offload.profile import Tier as Memory
from offload.profile.rates import MemoryRate
from offload.runtime import linears
from offload.specs import ModelSpec, Products, TensorSpec, UnitSpec, Workload
from offload.units import MIB

GB = 10**9


def machine(**changes: object) -> Profile:
    """A disk of 2 GB/s; memory of 20 GB/s; no software costs."""
    profile = Profile(
        name="made up",
        source="measured",
        tiers=(
            Memory(name="host", capacity_nbytes=1 << 40, processor="cpu", load="read"),
            Memory(name="disk", capacity_nbytes=1 << 50),
        ),
        lanes={"read": Lane((CopyRate(1, 1, 2.0 * GB),))},
        processors={"cpu": Processor(flops={"bfloat16": 1e18}, memory=(MemoryRate(1, 20.0 * GB),), efficiency=1.0)},
    )
    return replace(profile, **changes)  # type: ignore[arg-type]


def matrix(name: str, outputs: int, inputs: int, **more: object) -> TensorSpec:
    nbytes = 2 * outputs * inputs
    fields = {"format": "bfloat16", "stored_format": "bfloat16", "elements": outputs * inputs, "width": inputs}
    return TensorSpec(
        name=name,
        nbytes=nbytes,
        read_nbytes=nbytes,
        slot_nbytes=nbytes,
        outputs=outputs,
        inputs=inputs,
        **fields | more,
    )  # type: ignore[arg-type]


def model(blocks: int = 8) -> ModelSpec:
    """Blocks of one matrix of 100 MB, and nothing else."""
    return ModelSpec(
        units=tuple(UnitSpec(name=f"b{k}", tensors=(matrix(f"b{k}.w", 5000, 10000),)) for k in range(blocks))
    )


def test_a_disk_that_binds() -> None:
    """Half of 800 MB streams at 2 GB/s; memory takes 5 ms a block."""
    spec, work = model(), Workload(batch=1, prompt_tokens=1, total_tokens=2)
    placement = place(spec, host_nbytes=600 * MB, slots=2)
    found = Pricer(spec, work, Computer(profile=machine())).predict(placement, peak_rss_bytes=1000)
    assert placement.names(Tier.DISK)
    assert found.read_bytes_per_token == 400 * MB
    assert found.binding == "disk"
    assert found.bound_s_per_token == pytest.approx(0.2)
    assert found.decode_s_per_token == pytest.approx(0.2, rel=0.01)
    assert found.decode.bound.compute_s == pytest.approx(8 * 0.005)
    assert found.peak_rss_bytes == 1000
    assert found.device_peak_bytes == 0


def test_a_disk_is_faster_where_several_reads_are_in_flight() -> None:
    """One slot: a stream's part of 10 MB, being alone, and two hand-offs. Two: nearly as 20 MB in flight."""
    rates = (CopyRate(10 * MB, 1, 1.0 * GB), CopyRate(10 * MB, 2, 2.0 * GB))
    slow = machine(lanes={"read": Lane(rates)}, costs={"handoff": 0.5e-3, "read_alone": 1e-3})
    spec = ModelSpec(units=tuple(UnitSpec(name=f"b{k}", tensors=(matrix(f"b{k}.w", 500, 10000),)) for k in range(8)))
    pricer = Pricer(spec, Workload(batch=1, prompt_tokens=1, total_tokens=2), Computer(profile=slow))
    one = pricer.decode(place(spec, host_nbytes=50 * MB, slots=1))
    two = pricer.decode(place(spec, host_nbytes=60 * MB, slots=2))
    assert one.read_bytes == two.read_bytes == 40 * MB
    assert one.bound.disk_s == pytest.approx(0.02 + 4 * 2e-3)
    assert one.seconds == pytest.approx(0.028 + 4 * 0.0005, rel=0.01)
    assert two.bound.disk_s == pytest.approx(0.02, rel=0.06)


def test_what_is_stored_in_pieces_is_put_together_where_one_slot_waits_for_it() -> None:
    """Five of eight matrices of 10 MB stream, each stored in pieces; with two slots the disk reads on meanwhile."""
    pieces = [replace(matrix(f"b{k}.w", 500, 10000), slot_nbytes=21 * MB, staged_nbytes=10 * MB) for k in range(8)]
    spec = ModelSpec(units=tuple(UnitSpec(name=t.name, tensors=(t,)) for t in pieces))
    work = Workload(batch=1, prompt_tokens=1, total_tokens=2)
    plain, slower = machine(), machine(costs={"assemble": MIB / (1.0 * GB)})
    for slots, expected in ((1, 0.05), (2, 0.0)):
        placement = place(spec, host_nbytes=30 * MB + slots * 21 * MB, slots=slots)
        assert sum(map(len, placement.bundles.values())) == 5
        found = [Pricer(spec, work, Computer(profile=p)).decode(placement).bound.disk_s for p in (plain, slower)]
        assert found[1] - found[0] == pytest.approx(expected)


def test_computing_that_was_waited_for_wakes_up_first() -> None:
    """One slot: reads of 5 ms and computing take turns, and 4 of 8 blocks wait."""
    spec = ModelSpec(units=tuple(UnitSpec(name=f"b{k}", tensors=(matrix(f"b{k}.w", 500, 10000),)) for k in range(8)))
    work = Workload(batch=1, prompt_tokens=1, total_tokens=2)
    placement = place(spec, host_nbytes=50 * MB, slots=1)
    found = [Pricer(spec, work, Computer(profile=machine(costs={"waking": s}))).decode(placement) for s in (0.0, 1e-3)]
    assert found[1].seconds - found[0].seconds == pytest.approx(4 * 1e-3)


def test_interference_and_costs_count() -> None:
    spec, work = model(), Workload(batch=1, prompt_tokens=1, total_tokens=2)
    placement = place(spec, host_nbytes=600 * MB, slots=2)
    slower = machine(interference={"read": {"cpu": 0.5}}, costs={"unit": 0.05})
    found = Pricer(spec, work, Computer(profile=slower)).predict(placement)
    plain = Pricer(spec, work, Computer(profile=machine())).predict(placement)
    assert found.binding == "compute"  # 55 ms a block
    assert found.decode_s_per_token == pytest.approx(8 * 0.055, rel=0.02)
    assert found.decode_s_per_token > plain.decode_s_per_token


def test_shared_memory_counts_only_where_no_pair_was_measured() -> None:
    spec, work = model(), Workload(batch=1, prompt_tokens=1, total_tokens=2)
    placement = place(spec, host_nbytes=600 * MB, slots=2)
    base = machine(shared={"dram": 2.0 * GB})
    cpu = replace(base.processors["cpu"], shares={"dram": 1.0})
    shared = replace(base, processors={"cpu": cpu}, lanes={"read": replace(base.lanes["read"], shares={"dram": 1.0})})
    tight = Pricer(spec, work, Computer(profile=shared)).predict(placement).decode_s_per_token
    assert tight == pytest.approx(1.2 / 2, rel=0.05)  # 1.2 GB a token through 2 GB/s of memory
    known = replace(shared, interference={"read": {"cpu": 0.9}})
    assert Pricer(spec, work, Computer(profile=known)).predict(placement).decode_s_per_token < 0.25


def test_a_fourth_tier_needs_no_change() -> None:
    """A quarter of what streams fits in memory behind a switch, at 8 GB/s; the rest comes from disk through it."""
    spec, work = model(), Workload(batch=1, prompt_tokens=1, total_tokens=2)
    placement = place(spec, host_nbytes=600 * MB, slots=2)
    base = machine()
    host, disk = base.tiers
    switch = Memory(name="switch", capacity_nbytes=100 * MB, load="read")
    lanes = {**base.lanes, "switch": Lane((CopyRate(1, 1, 8.0 * GB),))}
    four = replace(base, tiers=(replace(host, load="switch"), switch, disk), lanes=lanes)
    found = Pricer(spec, work, Computer(profile=four)).predict(placement)
    assert found.bound_s_per_token == pytest.approx(0.1 / 8 + 0.3 / 2)
    roomy = replace(four, tiers=(four.tiers[0], replace(switch, capacity_nbytes=GB), disk))
    assert Pricer(spec, work, Computer(profile=roomy)).predict(placement).bound_s_per_token == pytest.approx(0.4 / 8)


def test_an_upload_needs_a_link() -> None:
    spec, work = model(), Workload(batch=1, prompt_tokens=1, total_tokens=2)
    placement = place(spec, host_nbytes=10 * GB, device_nbytes=600 * MB, slots=2)
    computer = Computer(profile=machine(), link_bytes_per_s=1.0 * GB)
    found = Pricer(spec, work, computer).predict(placement, device_beside=7)
    assert (found.binding, found.upload_bytes_per_token, found.read_bytes_per_token) == ("link", 400 * MB, 0)
    assert found.decode_s_per_token == pytest.approx(0.4, rel=0.01)
    assert found.device_peak_bytes == 7 + 400 * MB + placement.device_ring.nbytes


def test_copies_of_an_emulated_link_slow_computing_down_while_they_last() -> None:
    """Copies make 10 GB/s alone and 5 beside computing, which keeps 0.6 meanwhile: at 2 GB/s for 0.4 of the time."""
    cpu = replace(machine().processors["cpu"], copy=(MemoryRate(2, 10.0 * GB),))
    pairs = {"cpu": {"cpu.copy": 0.6}, "cpu.copy": {"cpu": 0.5}}
    profile = machine(processors={"cpu": cpu}, interference=pairs)
    work = Workload(batch=1, prompt_tokens=1, total_tokens=2)
    for link, expected in ((2.0 * GB, (0.84, 1.0)), (20.0 * GB, (0.6, 0.5))):
        pricer = Pricer(model(), work, Computer(profile=profile, link_bytes_per_s=link))
        assert pricer._beside_copies("cpu") == pytest.approx(expected)


def test_memory_of_a_process_moves_what_reads_it() -> None:
    """A product of one row took twice what the table says: every product reads as slowly, of many rows as well; but the
    moment is believed in part only."""
    table = OpTable(
        op="linear", implementation="cpu", processor="cpu", format="bfloat16", shape=(5000, 10000), over="rows",
        curve=Curve.of([(1, 0.01), (4, 0.012), (64, 0.05)]),
    )  # fmt: skip
    most = 0.01 * MOST_CHANGE**BELIEVED
    for took, expected in ((1.5, (0.015, 0.015, 0.05)), (0.6, (0.006, 0.008, 0.046)), (450.0, (most, most, 0.05))):
        seconds = 0.02 * took ** (1 / BELIEVED)  # so that what is believed is `took` times the table's
        products = Products(shapes=((5000, 10000), (5000, 10000)), dtype="bfloat16", seconds=seconds)
        found = with_product_rate(machine(ops=(table,)), products).ops[0].curve
        assert [found.seconds(rows) for rows in (1, 4, 64)] == pytest.approx(expected)


def test_a_product_in_two_places_is_both_and_what_lies_around_them() -> None:
    """On an emulated accelerator one processor does both; a result that is small is there at once."""
    cpu = replace(machine().processors["cpu"], launch_s=1e-4)
    profile = machine(processors={"cpu": cpu}, costs={"apart": 1e-3, "sleep": 1e-2})
    ops = OpCosts(profile, "cpu", link_bytes_per_s=1.0 * GB)
    tensor = model().units[0].tensors[0]
    assert ops.apart(tensor, "bfloat16", "bfloat16", 1, 4000).seconds == pytest.approx(0.005 + 1e-3)
    slept = ops.apart(tensor, "bfloat16", "bfloat16", 60, 0).seconds - 0.005 - 1e-3
    assert slept == pytest.approx(60 * 2 * (5000 + 10000) / GB + 2e-2)


def test_tables_decide_before_the_roofline() -> None:
    table = OpTable(
        op="linear", implementation="cpu", processor="cpu", format="bfloat16", shape=(5000, 10000), over="rows",
        curve=Curve.of([(1, 0.5), (64, 1.0)]),
    )  # fmt: skip
    costs = OpCosts(machine(ops=(table,)), "cpu")
    assert costs.linear("bfloat16", "bfloat16", 5000, 10000, 1).seconds == 0.5
    assert costs.linear("bfloat16", "bfloat16", 5000, 10000, FEW + 1).estimated_s > 0  # torch's turn: not measured
    exact = OpCosts(machine(ops=(table,)), "cpu", exact=True)
    assert exact.linear("bfloat16", "bfloat16", 5000, 10000, 1).seconds == pytest.approx(0.005)
    factor = OpCosts(machine(ops=(table,), calibration={"linear": 1.1}), "cpu")
    assert factor.linear("bfloat16", "bfloat16", 5000, 10000, 1).seconds == pytest.approx(0.55)


def test_packed_matrices_are_multiplied_or_unpacked() -> None:
    costs = OpCosts(machine(), "cpu")
    few = costs.linear("int8", "bfloat16", 5000, 10000, 1).seconds
    many = costs.linear("int8", "bfloat16", 5000, 10000, FEW + 1).seconds
    assert few == pytest.approx(5000 * 10000 * 8.1 / 8 / (20 * GB))
    assert many > 3 * few


def test_few_rows_are_few_everywhere() -> None:
    assert linears.FEW == FEW


def test_experts_that_are_touched() -> None:
    costs = OpCosts(machine(), "cpu")
    stack = matrix("e", 0, 0, elements=64 * 100 * 200, width=200, experts=64, chosen=8)
    one = costs.matrix(stack, "bfloat16", "bfloat16", 1).seconds
    assert one == pytest.approx(8 * 100 * 200 * 2 / (20 * GB))
    assert costs.matrix(stack, "bfloat16", "bfloat16", 1000).seconds == pytest.approx(8 * one, rel=1e-3)


def test_phases() -> None:
    work = Workload(batch=4, prompt_tokens=100, total_tokens=140)
    assert prefill(work) == Phase(sequences=4, tokens=100)
    assert decode(work) == Phase(sequences=4, tokens=1, past=120)


@pytest.mark.parametrize("name", presets())
def test_every_preset_predicts(name: str) -> None:
    spec = decoder()
    profile = preset(name)
    device = profile.tiers[0].name == "device"
    placement = place(spec, host_nbytes=2500 * MB, device_nbytes=2000 * MB if device else None)
    computer = Computer(profile=profile, processor="device" if device else "cpu")
    found = Pricer(spec, Workload(), computer).predict(placement)
    assert found.origin == "estimate"
    assert 0 < found.bound_s_per_token * 0.99 <= found.decode_s_per_token
    low, high = found.interval
    assert low <= found.decode_s_per_token <= high
    assert set(found.as_dict()) >= {"prefill_s", "tokens_per_s", "peak_rss_bytes", "binding"}
