"""Moments in 8 bits: the format against its definition, and the kernel's step against the reference."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch

from offload.kernels import choose, reference
from offload.kernels.formats.dynamic8 import (
    BLOCK,
    Dynamic8,
    dequantize_dynamic8,
    dynamic8_map,
    quantize_dynamic8,
    zeros_dynamic8,
)
from offload.kernels.reference import AdamW

step_8bit = choose("adamw_step_8bit", "cpu", forced="cpu")
SIGNED = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def numbers_of_all_sizes(count: int, signed: bool) -> torch.Tensor:
    torch.manual_seed(count)
    values = torch.rand(count) * 10 ** (torch.rand(count) * -8)
    return torch.where(torch.rand(count) < 0.5, -values, values) if signed else values


def state(count: int) -> tuple[torch.Tensor, Dynamic8, Dynamic8]:
    mean, square = numbers_of_all_sizes(count, True), numbers_of_all_sizes(count, False)
    return (
        numbers_of_all_sizes(count, True),
        quantize_dynamic8(mean, signed=True),
        quantize_dynamic8(square, signed=False),
    )


@SIGNED
def test_the_map_is_the_one_of_the_paper(signed: bool) -> None:
    """As bitsandbytes makes it, which rounds a few times more."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)
        values += [*middles.tolist(), *(-middles).tolist()] if signed else middles.tolist()
    torch.testing.assert_close(dynamic8_map(signed), torch.tensor(sorted(values)), rtol=1e-6, atol=0)


@SIGNED
def test_the_nearest_value_is_taken(signed: bool) -> None:
    values = numbers_of_all_sizes(40 * BLOCK, signed)
    values[::BLOCK] = 1.0
    got = quantize_dynamic8(values, signed=signed).codes.long()
    table = dynamic8_map(signed).double()
    nearest = (values.double()[:, None] - table).abs().argmin(1)
    assert (got - nearest).abs().max() <= 1
    off = got != nearest  # within rounding of the middle between two values
    chosen, best = ((values.double() - table[c])[off].abs() for c in (got, nearest))
    assert bool((chosen <= best * 1.0001).all())
    assert int(off.sum()) <= 2


@SIGNED
def test_every_code_comes_back(signed: bool) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    values = dequantize_dynamic8(Dynamic8(codes, torch.tensor([3.0]), signed))
    again = quantize_dynamic8(values, signed=signed)
    assert torch.equal(again.codes, codes)
    assert again.largest == 3


@SIGNED
def test_zeros_and_extremes(signed: bool) -> None:
    zero = zeros_dynamic8(BLOCK + 1, signed=signed)
    assert not dequantize_dynamic8(zero).any()
    assert torch.equal(quantize_dynamic8(torch.zeros(BLOCK + 1), signed=signed).codes, zero.codes)
    for size in (1e-42, 1e-38, 3e38):
        back = dequantize_dynamic8(quantize_dynamic8(torch.full((3,), size), signed=signed))
        assert bool(((back >= 0) & (back <= size)).all())


@pytest.mark.parametrize("count", [1, BLOCK, 5 * BLOCK + 3, 70_001])
@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("writes", [True, False], ids=["weight", ""])
def test_the_kernel_is_the_reference(count: int, grad_dtype: torch.dtype, writes: bool) -> None:
    numbers = AdamW(lr=3e-3, step=7, eps=1e-6, weight_decay=0.1, grad_scale=0.3)
    grad = numbers_of_all_sizes(count, True).to(grad_dtype)
    want, got = state(count), state(count)
    weights = [torch.empty(count, dtype=torch.bfloat16) if writes else None for _ in range(2)]
    squares = reference.adamw_step_8bit(*want, grad, weights[0], numbers)
    assert step_8bit.function()(*got, grad, weights[1], numbers) == pytest.approx(squares, rel=1e-5)
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(mine.largest, theirs.largest, rtol=1e-6, atol=0)
        apart = (mine.codes.int() - theirs.codes.int()).abs()
        assert int(apart.max()) <= 1
        assert int(apart.sum()) <= 1 + count // 10_000  # where rounding falls on the other side of a border
    if writes:
        assert torch.equal(weights[1], got[0].bfloat16())


def test_bits_depend_on_neither_threads_nor_place(threads: Callable[[int], None]) -> None:
    count, numbers = 50_000, AdamW(lr=1e-3, step=2)
    grad = numbers_of_all_sizes(count, True)
    begin, results = state(count), []
    for n, at in ((1, 0), (2, 0), (2, 1)):
        threads(n)
        mine = copy.deepcopy(begin)
        weight = torch.empty(count + 64, dtype=torch.bfloat16)[at : at + count]
        squares = step_8bit.function()(*mine, grad, weight, numbers)
        results.append((squares, mine, weight))
    for squares, mine, weight in results[1:]:
        assert squares == results[0][0]
        assert torch.equal(mine[0], results[0][1][0])
        assert all(torch.equal(a.codes, b.codes) for a, b in zip(mine[1:], results[0][1][1:], strict=True))
        assert torch.equal(weight, results[0][2])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_a_bad_gradient_shows_in_the_sum(bad: float) -> None:
    grad = torch.ones(2 * BLOCK)
    grad[50] = bad
    assert not torch.isfinite(torch.tensor(step_8bit.function()(*state(2 * BLOCK), grad, None, AdamW(lr=1e-3, step=1))))


def test_what_is_not_contiguous_is_refused() -> None:
    master, mean, square = state(BLOCK)
    assert step_8bit.refuses()(master, mean, square, torch.ones(2 * BLOCK)[::2], None, AdamW(lr=1e-3, step=1))
    assert not step_8bit.refuses()(master, mean, square, torch.ones(BLOCK), None, AdamW(lr=1e-3, step=1))


def test_it_learns_as_with_moments_in_float32() -> None:
    torch.manual_seed(0)
    inputs, truth = torch.randn(64, 300), torch.randn(300)
    losses = []
    for op in (reference.adamw_step, step_8bit.function()):
        weight = torch.zeros(300)
        moments = (zeros_dynamic8(300, signed=True), zeros_dynamic8(300, signed=False))
        if op is reference.adamw_step:
            moments = (torch.zeros(300), torch.zeros(300))
        for step in range(1, 60):
            error = inputs @ (weight - truth)
            op(weight, *moments, inputs.T @ error / 64, None, AdamW(lr=3e-2, step=step, weight_decay=0.0))
        losses.append(float(error.square().mean()))
    assert losses[1] < 1.2 * losses[0]
