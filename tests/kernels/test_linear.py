"""Linear kernels against float64, at odd shapes; bits that depend on neither threads nor neighbours."""

from collections.abc import Callable, Iterator

import pytest
import torch
from kernel_errors import assert_near
from torch.nn import functional

from offload.kernels import choose
from offload.kernels.formats.int4 import dequantize_int4, quantize_int4
from offload.kernels.formats.int8 import dequantize_int8, quantize_int8

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
linear = choose("linear", "cpu", forced="cpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs"), [(1, 1, 1), (1, 70, 33), (3, 5, 576), (4, 129, 64), (7, 33, 47)]
)
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
def test_linear_is_near_the_exact_sum(
    dtype: torch.dtype, rows: int, outputs: int, inputs: int, with_bias: bool
) -> None:
    x, weight = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
    bias = torch.randn(outputs).to(dtype) if with_bias else None
    exact = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert_near(linear.function()(x, weight, bias), exact, roundings=1, what=f"linear {dtype}", sums=4 * inputs)


def test_shape_of_the_input_is_kept() -> None:
    x, weight = torch.randn(2, 3, 64), torch.randn(10, 64)
    assert linear.function()(x, weight).shape == (2, 3, 10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_depend_on_neither_threads_nor_rows(dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    x, weight = torch.randn(9, 200).to(dtype), torch.randn(3000, 200).to(dtype)
    threads(1)
    alone = linear.function()(x, weight)
    threads(2)
    assert torch.equal(linear.function()(x, weight), alone)
    for row in range(9):
        assert torch.equal(linear.function()(x[row : row + 1], weight)[0], alone[row])


def test_not_a_number_and_infinity_survive() -> None:
    x = torch.tensor([[1.0, 1.0]], dtype=torch.bfloat16)
    weight = torch.tensor([[float("nan"), 1], [float("inf"), 1], [-float("inf"), 1]], dtype=torch.bfloat16)
    got = linear.function()(x, weight)[0]
    assert got[0].isnan()
    assert got[1:].tolist() == [float("inf"), -float("inf")]


def test_it_says_what_it_does_not_take() -> None:
    refuses = linear.refuses()
    weight = torch.randn(8, 8)
    assert refuses(torch.randn(1, 8), weight) is None
    assert "dtype" in str(refuses(torch.randn(1, 8).double(), weight)) or refuses(torch.randn(1, 8).double(), weight)
    assert refuses(torch.randn(1000, 8), weight)
    assert refuses(torch.randn(2, 8), torch.randn(8, 16)[:, ::2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 70, 33), (4, 65, 256), (6, 30, 576)])
def test_int8_is_near_the_exact_sum(dtype: torch.dtype, rows: int, outputs: int, inputs: int) -> None:
    x, bias = torch.randn(rows, inputs).to(dtype), torch.randn(outputs).to(dtype)
    weight = quantize_int8(torch.randn(outputs, inputs))
    exact = functional.linear(x.double(), weight.q.double() * weight.scale[:, None].double(), bias.double())
    got = choose("linear_int8", "cpu", forced="cpu").function()(x, weight, bias)
    assert_near(got, exact, roundings=1, what=f"linear_int8 {dtype}", sums=4 * inputs)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 70, 128), (4, 65, 256), (2, 30, 576), (1, 3, 40)])
def test_int4_is_near_the_exact_sum(group: int, symmetric: bool, rows: int, outputs: int, inputs: int) -> None:
    x, bias = torch.randn(rows, inputs), torch.randn(outputs)
    weight = quantize_int4(torch.randn(outputs, inputs), group, symmetric=symmetric)
    exact = functional.linear(x.double(), dequantize_int4(weight).double(), bias.double())
    got = choose("linear_int4", "cpu", forced="cpu").function()(x, weight, bias)
    assert_near(got, exact, roundings=64, what=f"linear_int4 {group}", sums=64 * inputs)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
def test_int4_rounds_to_the_nearest_step(group: int, symmetric: bool) -> None:
    weight = torch.randn(7, 384)
    packed = quantize_int4(weight, group, symmetric=symmetric)
    step = packed.scale.float().abs().repeat_interleave(group, 1)[:, :384]
    error = (dequantize_int4(packed) - weight).abs()
    assert bool((error <= step * (1.01 if symmetric else 0.52) + 1e-3).all())
    assert packed.nbytes == 7 * 192 + packed.scale.numel() * (2 if symmetric else 4)


def test_int8_keeps_eight_bits() -> None:
    weight = torch.randn(7, 100)
    error = (dequantize_int8(quantize_int8(weight)) - weight).abs()
    assert bool((error <= weight.abs().amax(1, keepdim=True) / 127 * 0.501).all())
