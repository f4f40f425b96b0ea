"""Prices of mixtures of experts, of matrices in another layout, and of what a first pass does once: closed forms."""

from __future__ import annotations

from dataclasses import replace
from math import comb

import pytest
from test_predict import GB, machine, matrix

from offload.planner.experts import different_rows, rows_of_experts
from offload.planner.firsts import MANY, first_s
from offload.planner.ops import VERY_FEW, OpCosts, Phase
from offload.planner.workspace import mixed_nbytes, workspace
from offload.profile import Curve, OpTable
from offload.runtime import linears
from offload.specs import ModelSpec, TensorSpec, UnitSpec, Workload


def table(op: str, shape: tuple[int, int], points: list[tuple[float, float]], implementation: str = "cpu") -> OpTable:
    return OpTable(
        op=op, implementation=implementation, processor="cpu", format="bfloat16", shape=shape, over="rows",
        curve=Curve.of(points),
    )  # fmt: skip


def stack(experts: int = 16, chosen: int = 4, outputs: int = 100, inputs: int = 200) -> TensorSpec:
    elements = experts * outputs * inputs
    return matrix("e", 0, 0, elements=elements, width=inputs, experts=experts, chosen=chosen)


@pytest.mark.parametrize(
    ("experts", "chosen", "tokens"), [(16, 4, 1), (16, 4, 9), (64, 8, 300), (4, 4, 7), (160, 6, 8)]
)
def test_rows_are_binomial(experts: int, chosen: int, tokens: int) -> None:
    found = dict(rows_of_experts(experts, chosen, tokens))
    assert sum(n * count for n, count in found.items()) == pytest.approx(tokens * chosen)
    hit = experts * (1 - (1 - chosen / experts) ** tokens)
    assert sum(found.values()) == pytest.approx(hit)
    share = chosen / experts
    for rows, count in found.items():
        exact = comb(tokens, rows) * share**rows * (1 - share) ** (tokens - rows)
        assert count == pytest.approx(experts * exact, rel=1e-6, abs=1e-12)


def test_a_product_costs_what_its_rows_cost_and_not_what_the_mean_costs() -> None:
    """Two tokens and half of two experts: one row or two, each with a chance of a half and a quarter."""
    costs = OpCosts(machine(ops=(table("linear_groups", (100, 200), [(1, 1.0), (2, 5.0)]),)), "cpu")
    found = costs.matrix(stack(experts=2, chosen=1), "bfloat16", "bfloat16", 2)
    assert found.seconds == pytest.approx(2 * (0.5 * 1.0 + 0.25 * 5.0))


def test_whose_table_experts_have() -> None:
    ours = table("linear_groups", (100, 200), [(1, 1.0)])
    torchs = table("linear_groups", (100, 200), [(1, 3.0)], "torch")
    one = stack(chosen=1)
    for ops, exact, seconds in (((ours, torchs), False, 1.0), ((ours, torchs), True, 3.0), ((torchs,), False, 3.0)):
        costs = OpCosts(machine(ops=ops), "cpu", exact=exact)
        assert costs.matrix(one, "bfloat16", "bfloat16", 1).seconds == pytest.approx(seconds)
    twice = OpCosts(machine(ops=(ours,)), "cpu").matrix(stack(chosen=1, outputs=200), "bfloat16", "bfloat16", 1)
    assert twice.seconds == pytest.approx(2.0), "another shape is scaled"
    without = OpCosts(machine(), "cpu").matrix(one, "bfloat16", "bfloat16", 1)
    assert without.seconds == pytest.approx(100 * 200 * 2 / (20 * GB))


def test_another_layout_has_a_table_of_its_own() -> None:
    plain, other = table("linear", (100, 200), [(1, 1.0)]), table("linear_transposed", (100, 200), [(1, 3.0)], "torch")
    weight = matrix("w", 100, 200, is_transposed=True)
    profile = machine(ops=(plain, other))
    assert OpCosts(profile, "cpu").matrix(weight, "bfloat16", "bfloat16", 1).seconds == 3.0
    assert (
        OpCosts(profile, "cpu").matrix(replace(weight, is_transposed=False), "bfloat16", "bfloat16", 1).seconds == 1.0
    )
    by_torch = machine(ops=(plain, table("linear", (100, 200), [(1, 2.0)], "torch")))
    assert OpCosts(by_torch, "cpu").matrix(weight, "bfloat16", "bfloat16", 1).seconds == 2.0, "the nearest there is"


def model(*tensors: TensorSpec, layers: int = 1) -> ModelSpec:
    units = tuple(UnitSpec(name=f"b{k}", tensors=tensors, layers=1) for k in range(layers))
    return ModelSpec(units=units, kv_layers=layers)


def test_kernels_are_made_where_torch_multiplies() -> None:
    profile = machine(costs={"first": 1.0, "first_torch": 100.0})
    spec = model(matrix("a", 100, 200), matrix("b", 100, 200), matrix("c", 300, 200), layers=5)
    for rows, exact, seconds in ((4, False, 0), (5, False, 200), (8, False, 2), (8, True, 200), (3, True, 0)):
        costs = OpCosts(profile, "cpu", exact=exact)
        assert first_s(spec, Phase(sequences=1, tokens=rows), costs) == seconds
    assert (
        first_s(model(matrix("w", 100, 200, is_transposed=True)), Phase(sequences=1, tokens=8), OpCosts(profile, "cpu"))
        == 100
    )
    head = UnitSpec(name="head", tensors=(matrix("h", 500, 200),), is_head=True)
    assert first_s(ModelSpec(units=(head,)), Phase(sequences=1, tokens=50), OpCosts(profile, "cpu")) == 0


def test_experts_of_torch_make_a_kernel_for_every_number_of_rows() -> None:
    ours = table("linear_groups", (100, 200), [(1, 1.0)])
    torchs = table("linear_groups", (100, 200), [(1, 1.0)], "torch")
    phase, spec = Phase(sequences=1, tokens=64), model(stack(), layers=3)
    costs = {"first_torch": 1.0}
    assert first_s(spec, phase, OpCosts(machine(ops=(ours, torchs), costs=costs), "cpu")) == 0
    found = first_s(spec, phase, OpCosts(machine(ops=(torchs,), costs=costs), "cpu"))
    parts = [comb(64, n) * 0.25**n * 0.75 ** (64 - n) for n in range(VERY_FEW + 1, 65)]
    assert found == pytest.approx(sum(1 - (1 - p) ** (16 * 3) for p in parts), rel=1e-3)
    assert 10 < found < 48
    assert different_rows(16, 4, 1, 3, lambda n: True) == pytest.approx(1, rel=1e-3)


def test_ours_begin_where_the_runtime_says() -> None:
    assert MANY == linears.MANY


@pytest.mark.parametrize("exact", [False, True])
def test_of_an_op_by_both_the_one_that_runs_is_priced(exact: bool) -> None:
    """Attention of a new token: whatever the order of the tables, exact results are torch's and others the kernel's."""
    ours, torchs = (
        OpTable(
            op="decode_attention", implementation=name, processor="cpu", format="bfloat16", shape=(4, 2, 16),
            over="bytes", curve=Curve.of([(1.0, seconds)]),
        )
        for name, seconds in (("cpu", 1e-3), ("torch", 1.0))
    )  # fmt: skip
    spec = ModelSpec(units=(), kv_layers=1, heads=4, kv_heads=2, head_dim=16, kv_bytes_per_token=1)
    for ops in ((ours, torchs), (torchs, ours)):
        found = OpCosts(machine(ops=ops), "cpu", exact=exact).attention(spec, Phase(sequences=1, tokens=1))
        assert found.seconds == (1.0 if exact else 1e-3)


def test_a_mixture_holds_the_rows_of_its_experts() -> None:
    """Gate and up of 100 each, four experts a token: 4 x (200 + 200) numbers of two bytes, beside six hidden states."""
    up, down = stack(outputs=200, inputs=80), stack(outputs=80, inputs=100)
    spec = replace(model(up, down), hidden_nbytes=160, widest_nbytes=400)
    work = Workload(batch=2, prompt_tokens=10, total_tokens=20)
    assert mixed_nbytes(spec) == 2 * 4 * 400
    assert workspace(spec, work).activations == 20 * (3200 + 6 * 160) + 2 * 100
    assert mixed_nbytes(model(matrix("w", 100, 200))) == 0
