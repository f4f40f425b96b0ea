"""Matrices that two processors multiply by: what is cut where, and that it changes no result."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import MODELS, Tiny

import offload
import offload.handle
from offload.errors import UsageError
from offload.io.extents import Extent
from offload.kernels.chosen import Kernels
from offload.planner.placement import Placement, Tier, place
from offload.planner.processors import GRANULE, balanced_share, cut, host_part, parse_share
from offload.planner.schedule import Compute, Upload, emit
from offload.processors import choose_share, known_rates
from offload.profile import Curve, OpTable, preset
from offload.specs import ModelSpec, TensorSpec, UnitSpec
from offload.tiers.layout import Piece, Source

MB = 1_000_000
SHARES = st.sampled_from([0.0, 0.1, 0.37, 0.5, 0.9, 1.0])


def matrix(name: str, outputs: int, inputs: int, is_packed: bool = False) -> TensorSpec:
    size = 2 * outputs * inputs
    shape = {"outputs": outputs, "inputs": inputs}
    return TensorSpec(name=name, nbytes=size, read_nbytes=size, slot_nbytes=size + 12288, is_packed=is_packed, **shape)


def decoder(is_packed: bool = False) -> ModelSpec:
    def block(k: int) -> UnitSpec:
        sizes = {"q": (3072, 3072), "k": (1024, 3072), "up": (8192, 3072), "down": (3072, 8192)}
        parts = [matrix(f"{k}.{n}", *shape, is_packed) for n, shape in sizes.items()]
        norm = TensorSpec(name=f"{k}.norm", nbytes=6144, read_nbytes=6144, slot_nbytes=20480)
        return UnitSpec(name=f"{k}", tensors=(*parts, norm))

    return ModelSpec(units=tuple(map(block, range(12))))


def device_bytes(spec: ModelSpec, placement: Placement) -> int:
    """What stays on the device and its ring."""
    sizes = {t.name: t.nbytes for u in spec.units for t in u.tensors}
    return sum(sizes[n] for n in placement.names(Tier.DEVICE)) + placement.device_ring.nbytes


@given(st.integers(400, 1500), SHARES, st.booleans())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_a_share_keeps_its_promise(device: int, share: float, is_packed: bool) -> None:
    """All rows are somewhere, budgets hold, slots suffice, and the CPU has about its share of what travels."""
    spec = decoder(is_packed)
    found = place(spec, host_nbytes=4000 * MB, device_nbytes=device * MB, cpu_share=share)
    assert device_bytes(spec, found) <= device * MB
    whole = {t.name: t for u in spec.units for t in u.tensors}
    parts = {t.name: t for ts in found.host_parts.values() for t in ts}
    travelling = {t.name: t for ts in found.bundles.values() for t in ts}
    for name, first in found.first_rows.items():
        rest = parts[host_part(name, first)]
        assert rest.outputs + first == whole[name].outputs
        assert first == 0 or travelling[name].outputs == first
        assert is_packed is False or first == 0, "a packed matrix is not cut"
    assert all(sum(t.slot_nbytes for t in ts) <= found.device_ring.slot_nbytes for ts in found.bundles.values())
    by_cpu, by_link = sum(t.nbytes for t in parts.values()), sum(t.nbytes for t in travelling.values())
    largest = max(t.nbytes for t in whole.values())
    slack = largest if is_packed else GRANULE / 1024 * (by_cpu + by_link)
    assert abs(by_cpu - share * (by_cpu + by_link)) <= slack
    assert set(found.home) == set(whole) | set(parts)


def test_a_smaller_ring_leaves_more_on_the_device() -> None:
    spec = decoder()
    alone, shared = (place(spec, host_nbytes=4000 * MB, device_nbytes=700 * MB, cpu_share=s) for s in (0.0, 0.8))
    sizes = {t.name: t.nbytes for u in spec.units for t in u.tensors}
    kept = [sum(sizes[n] for n in p.names(Tier.DEVICE)) for p in (alone, shared)]
    assert shared.device_ring.nbytes < alone.device_ring.nbytes / 2
    assert kept[1] > kept[0]


def test_main_memory_that_cannot_hold_the_share_gets_less() -> None:
    spec = decoder()
    found = place(spec, host_nbytes=500 * MB, device_nbytes=500 * MB, cpu_share=1.0)
    assert 0 < sum(t.nbytes for ts in found.host_parts.values() for t in ts) <= 500 * MB


def test_the_schedule_says_who_computes() -> None:
    spec = decoder()
    found = place(spec, host_nbytes=4000 * MB, device_nbytes=700 * MB, cpu_share=0.5)
    steps = emit([(u.name, u.nbytes) for u in spec.units], found)
    up = sum(s.nbytes for s in steps if isinstance(s, Upload))
    by_cpu = sum(s.cpu_nbytes for s in steps if isinstance(s, Compute))
    assert by_cpu == pytest.approx(up, rel=0.02)


def test_both_finish_together() -> None:
    share = balanced_share(30e9, 10e9)
    assert share / 30e9 == pytest.approx((1 - share) / 10e9)


def test_no_share_cuts_nothing() -> None:
    bundles = {u.name: u.tensors for u in decoder().units}
    assert cut(bundles, 0.0).bundles == bundles


@pytest.mark.parametrize(
    ("asked", "device", "exact"),
    [(2, "emulated", False), ("much", "cuda:0", False), (0.5, "cpu", False), (1, "x", True)],
)
def test_what_makes_no_sense_is_refused(asked: Any, device: str, exact: bool) -> None:
    with pytest.raises(UsageError, match="cpu_share"):
        parse_share(asked, device, exact)


def test_rates_decide_where_nothing_is_asked() -> None:
    assert parse_share(None, "cuda:0", False) is None
    assert parse_share("auto", "emulated", False) is None
    assert parse_share(None, "emulated", True) == parse_share(None, "cpu", False) == 0.0


# Whole models.

FEW = torch.tensor([[44, 45, 46, 47, 48, 49, 300, 51], [5, 9, 200, 31, 7, 44, 3, 8]])
MANY = torch.arange(96).view(2, 48) % 300 + 3  # more rows than the CPU multiplies by


@pytest.fixture(scope="module", params=["llama", "qwen2", "mixtral"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny = MODELS[request.param]
    wide = Tiny(tiny.config, tiny.sizes | {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 14})
    return wide.save(tmp_path_factory.mktemp(request.param), torch.bfloat16)


def load(checkpoint: Path, gpu_memory: str | int = 200_000, **options: Any) -> offload.handle.Offloaded:
    """Onto a device with the least memory that works, which the first refusal names."""
    try:
        return offload.load(
            checkpoint, device="emulated", gpu_memory=gpu_memory, batch=2, context=56, strict=True, **options
        )
    except offload.BudgetError as error:
        named = re.search(r"smallest gpu_memory that works is ([\d.]+ \w+)", str(error))
        if named is None:
            raise
        return load(checkpoint, named[1].replace(" ", ""), **options)


def logits(checkpoint: Path, prompt: torch.Tensor, **options: Any) -> torch.Tensor:
    """Of a prompt and some steps."""
    handle = load(checkpoint, **options)
    with handle as model:
        found = model.generate(
            prompt, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True, pad_token_id=0
        )
        if options.get("cpu_share"):
            assert handle.division.placement.host_parts
            statistics = handle.session.device.statistics()
            assert statistics.downloaded_bytes > 0
    return torch.stack(found.logits)


@pytest.mark.parametrize(("share", "weights"), [(0.4, None), (1.0, None), (0.4, "lossless"), (1.0, "int8")])
def test_rows_on_two_processors_change_no_bit(checkpoint: Path, share: float, weights: str | None) -> None:
    """The emulated device computes with the CPU's kernels, whose rows do not depend on each other."""
    expected = logits(checkpoint, FEW, weights=weights, cpu_share=0)
    assert torch.equal(logits(checkpoint, FEW, weights=weights, cpu_share=share), expected)


def test_inference_mode(checkpoint: Path) -> None:
    """Its tensors have no version to share a copy by."""
    handle = load(checkpoint, cpu_share=0.4)
    with handle as model:
        assert handle.division.placement.first_rows
        with torch.no_grad():
            expected = model(FEW).logits
        with torch.inference_mode():
            assert torch.equal(model(FEW).logits, expected)


@pytest.mark.parametrize("share", [0.4, 1.0])
def test_long_prompts_fetch_what_the_cpu_has(checkpoint: Path, share: float) -> None:
    expected = logits(checkpoint, MANY, cpu_share=0)
    torch.testing.assert_close(logits(checkpoint, MANY, cpu_share=share), expected, rtol=0.05, atol=0.05)


def test_a_wrapped_module_is_shared_too() -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(8)))
    x = torch.randn(3, 256)
    with torch.no_grad():
        expected = module(x)
        handle = offload.wrap(module, device="emulated", gpu_memory="1600KiB", workspace=0, cpu_share=0.5, link="1GB/s")
        with handle as wrapped:
            found = wrapped(x)
            assert handle.division.placement.first_rows
            whole = {n: p + 0 for n, p in wrapped.named_parameters()}  # whoever touches one gets all its rows
        assert torch.equal(module(x), expected)
    torch.testing.assert_close(found, expected)
    assert all(torch.equal(whole[n], p) for n, p in module.named_parameters())


def test_rates_decide_how_much(checkpoint: Path) -> None:
    """Over a link as slow as this one, anything is worth leaving to the CPU."""
    handle = load(checkpoint, link="1MB/s", dry_run=True)
    with handle:
        placement = handle.division.placement
        assert sum(t.nbytes for ts in placement.host_parts.values() for t in ts) > 0
        assert not any(t.outputs for ts in placement.bundles.values() for t in ts), "no row of a linear crosses"


def test_the_share_follows_measured_rates() -> None:
    """Those of each while the other works; an estimate, or a machine without a table, says nothing."""
    outputs, inputs = 4096, 4096
    piece = Piece(Extent("", 0, 2 * outputs * inputs), torch.bfloat16, 0, outputs * inputs)
    source = Source("w", torch.bfloat16, (outputs, inputs), (piece,))
    table = OpTable(
        op="linear", implementation="cpu", processor="cpu", format="bfloat16", shape=(outputs, inputs), over="rows",
        curve=Curve.of([(1, source.nbytes / 30e9)]),
    )  # fmt: skip
    base = preset("rtx4090-gen4-nvme4")
    kept = {"cpu": {"h2d": 0.8}, "h2d": {"cpu": 0.5}}
    profile = replace(base, source="measured", ops=(table,), interference=kept)
    rates = known_rates(profile, [source], 1, 10e9)
    assert rates == pytest.approx((24e9, 5e9))
    assert known_rates(profile, [source], 1, None) == pytest.approx((24e9, profile.lane("h2d").bytes_per_s / 2))
    assert known_rates(replace(profile, source="estimate"), [source], 1, 10e9) is None
    assert known_rates(replace(profile, ops=()), [source], 1, 10e9) is None
    common = {"fits": False, "device": "emulated", "exact": False, "link_bytes_per_s": 10e9, "profile": profile}
    share = choose_share("auto", [source], 1, Kernels("cpu", exact=False), **common)
    assert share == pytest.approx(24 / 29)


def test_what_is_put_together_arrives_whole_on_a_device() -> None:
    """A stack of experts is stored in pieces: a slot of main memory holds them, too, one of a device does not."""
    size = 64 * MB
    stacks = [
        TensorSpec(name=f"{k}.experts", nbytes=size, read_nbytes=size, slot_nbytes=2 * size + 12288, staged_nbytes=size)
        for k in range(8)
    ]
    spec = ModelSpec(units=tuple(UnitSpec(name=t.name, tensors=(t,)) for t in stacks))
    found = place(spec, host_nbytes=4 * size + 4 * 12288, device_nbytes=4 * size)
    assert found.device_ring.slots * found.device_ring.slot_nbytes <= 2 * size + 2 * 12288
    assert found.host_ring.slot_nbytes >= 2 * size
    assert len(found.names(Tier.DEVICE)) == 1, "two slots, and what else fits"
