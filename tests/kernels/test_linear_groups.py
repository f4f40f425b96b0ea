"""Products by experts in one call: the bits of each group alone, however they are mixed."""

import pytest
import torch
from kernel_errors import assert_near

from offload.kernels import choose
from offload.kernels.cpu.linear_many import has_pairs

groups, plain = (choose("linear_groups", "cpu", forced=name) for name in ("cpu", "torch"))
few, many = (choose(op, "cpu", forced="cpu") for op in ("linear", "linear_many"))
pytestmark = pytest.mark.skipif(not has_pairs(), reason="this processor does not multiply pairs of bf16")
CASES = [((3, 0, 1, 8, 70), 80, 96), ((0, 0), 16, 32), ((1,) * 9, 208, 2080), ((7, 5, 12), 1040, 64), ((9, 0), 64, 32)]


@pytest.mark.parametrize(("rows", "outputs", "inputs"), CASES, ids=str)
def test_every_group_is_what_it_would_be_alone(rows: tuple[int, ...], outputs: int, inputs: int) -> None:
    torch.manual_seed(0)
    x, stack = torch.randn(sum(rows), inputs).bfloat16(), torch.randn(len(rows), outputs, inputs).bfloat16()
    assert groups.refuses()(x, stack, rows) is None
    found = groups.function()(x, stack, rows)
    assert found.shape == (sum(rows), outputs)
    for part, got, weight in zip(x.split(list(rows)), found.split(list(rows)), stack, strict=True):
        if not len(part):
            continue
        assert_near(got, part.double() @ weight.double().T, roundings=1, what=str(rows), sums=inputs)
        alone = few if len(part) <= 4 else many if len(part) >= 8 else None
        if alone is not None:
            assert torch.equal(alone.function()(part.contiguous(), weight), got)
    torch.testing.assert_close(found, plain.function()(x, stack, rows), rtol=0.02, atol=0.02 * inputs**0.5)


def test_threads_do_not_matter() -> None:
    torch.manual_seed(0)
    rows, before = (5, 1, 40, 0, 9), torch.get_num_threads()
    x, stack = torch.randn(sum(rows), 512).bfloat16(), torch.randn(5, 400, 512).bfloat16()
    try:
        torch.set_num_threads(1)
        alone = groups.function()(x, stack, rows)
        torch.set_num_threads(2)
        assert torch.equal(groups.function()(x, stack, rows), alone)
    finally:
        torch.set_num_threads(before)


def test_what_it_does_not_take() -> None:
    x, stack = torch.randn(2, 64).bfloat16(), torch.randn(2, 32, 64).bfloat16()
    refuses = groups.refuses()
    assert refuses(x, stack, (1, 1)) is None
    assert "not multiples" in (refuses(x, stack[:, :31].contiguous(), (1, 1)) or "")
    assert "not contiguous" in (refuses(x, torch.randn(2, 64, 32).bfloat16().mT, (1, 1)) or "")
    assert "float32" in (refuses(x.float(), stack.float(), (1, 1)) or "")
