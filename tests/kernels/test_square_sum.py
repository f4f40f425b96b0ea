"""The sum of squares: the kernel against the reference, whatever the number of threads."""

import pytest
import torch

from offload.kernels import choose, reference

FAST = choose("square_sum", "cpu", forced="cpu").function()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("count", [1, 64, 1000, 200_000])
def test_the_kernel_is_the_reference(count: int, dtype: torch.dtype) -> None:
    values = torch.randn(count, generator=torch.Generator().manual_seed(count)).to(dtype)
    assert FAST(values) == pytest.approx(reference.square_sum(values), rel=1e-5)


def test_threads_change_nothing() -> None:
    values, before = torch.randn(300_000), torch.get_num_threads()
    torch.set_num_threads(1)
    alone = FAST(values)
    torch.set_num_threads(before)
    assert FAST(values) == alone


def test_a_bad_element_shows() -> None:
    values = torch.zeros(1000)
    values[500] = float("inf")
    assert FAST(values) == float("inf")
