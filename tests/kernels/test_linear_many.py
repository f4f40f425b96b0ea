"""The product of matrices in bf16: near the exact one, and a row's bits do not depend on the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from kernel_errors import assert_near

from offload.kernels import choose
from offload.kernels.cpu.linear_many import has_pairs

many = choose("linear_many", "cpu", forced="cpu")
pytestmark = pytest.mark.skipif(not has_pairs(), reason="this processor does not multiply pairs of bf16")
SHAPES = [(8, 16, 32), (9, 80, 96), (13, 64, 2048), (50, 208, 4128), (65, 1024, 288), (7 * 64, 192, 64)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_it_is_near_the_exact_product(shape: tuple[int, int, int], has_bias: bool) -> None:
    torch.manual_seed(0)
    rows, outputs, inputs = shape
    x, weight = torch.randn(rows, inputs).bfloat16(), torch.randn(outputs, inputs).bfloat16()
    bias = torch.randn(outputs).bfloat16() if has_bias else None
    assert many.refuses()(x, weight, bias) is None
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert_near(many.function()(x, weight, bias), exact, roundings=1, what=str(shape), sums=inputs)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_bits_depend_on_neither_rows_nor_threads_nor_places(threads: Callable[[int], None]) -> None:
    torch.manual_seed(0)
    x, room = torch.randn(2, 70, 96).bfloat16(), torch.randn(176 * 96 + 3).bfloat16()
    weight = room[3:].view(176, 96)
    threads(1)
    whole = many.function()(x, weight)
    assert whole.shape == (2, 70, 176)
    threads(2)
    assert torch.equal(many.function()(x, weight.clone()), whole)
    flat = x.view(140, 96)
    for rows in (8, 11, 12, 139):
        assert torch.equal(many.function()(flat[-rows:], weight), whole.view(140, 176)[-rows:])


def test_what_it_does_not_take() -> None:
    x, weight = torch.randn(8, 64).bfloat16(), torch.randn(32, 64).bfloat16()
    refuses = many.refuses()
    assert refuses(x, weight) is None
    assert "fewer than 8 rows" in (refuses(x[:7], weight) or "")
    assert "not multiples" in (refuses(x, weight[:31]) or "")
    assert "not multiples" in (refuses(x[:, :48].contiguous(), weight[:, :48].contiguous()) or "")
    assert "not contiguous" in (refuses(x, torch.randn(64, 32).bfloat16().T) or "")
    assert "float32" in (refuses(x.float(), weight.float()) or "")
