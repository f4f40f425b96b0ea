"""Products with a matrix that lies as [inputs, outputs]: near the exact one, and a row's bits are its own."""

import pytest
import torch
from kernel_errors import assert_near

from offload.kernels import choose
from offload.kernels.cpu.linear_many import has_pairs

transposed = choose("linear_transposed", "cpu", forced="cpu")
pytestmark = pytest.mark.skipif(not has_pairs(), reason="this processor does not multiply pairs of bf16")


@pytest.mark.parametrize("shape", [(1, 16, 32), (1, 320, 1056), (3, 48, 96), (4, 1024, 2080), (2, 80, 544)], ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_it_is_near_the_exact_product(shape: tuple[int, int, int], has_bias: bool) -> None:
    torch.manual_seed(0)
    rows, inputs, outputs = shape
    x, weight = torch.randn(rows, inputs).bfloat16(), torch.randn(inputs, outputs).bfloat16()
    bias = torch.randn(outputs).bfloat16() if has_bias else None
    assert transposed.refuses()(x, weight, bias) is None
    exact = x.double() @ weight.double() + (0 if bias is None else bias.double())
    assert_near(transposed.function()(x, weight, bias), exact, roundings=1, what=str(shape), sums=inputs)


def test_bits_depend_on_neither_rows_nor_threads_nor_places() -> None:
    torch.manual_seed(0)
    x, room, before = torch.randn(4, 96).bfloat16(), torch.randn(96 * 1184 + 3).bfloat16(), torch.get_num_threads()
    weight = room[3:].view(96, 1184)
    try:
        torch.set_num_threads(1)
        whole = transposed.function()(x, weight)
        torch.set_num_threads(2)
        assert torch.equal(transposed.function()(x, weight.clone()), whole)
    finally:
        torch.set_num_threads(before)
    for rows in (1, 2, 3):
        assert torch.equal(transposed.function()(x[-rows:], weight), whole[-rows:])


def test_what_it_does_not_take() -> None:
    x, weight = torch.randn(2, 64).bfloat16(), torch.randn(64, 32).bfloat16()
    refuses = transposed.refuses()
    assert refuses(x, weight) is None
    assert "more than 4 rows" in (refuses(torch.randn(8, 64).bfloat16(), weight) or "")
    assert "not multiples" in (refuses(x, weight[:, :31].contiguous()) or "")
    assert "not contiguous" in (refuses(x, torch.randn(32, 64).bfloat16().T) or "")
    assert "float32" in (refuses(x.float(), weight.float()) or "")
