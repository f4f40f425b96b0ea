"""The optimizer's step against the reference, and the reference against torch.optim."""

import pytest
import torch

from offload.kernels import choose, reference
from offload.kernels.reference import AdamW


def state(count: int, seed: int = 0) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(count), torch.randn(count) * 0.1, torch.rand(count) * 0.01]


def test_the_reference_is_torch_optim() -> None:
    parameter = torch.nn.Parameter(torch.randn(50))
    master, mean, square = parameter.detach().clone(), torch.zeros(50), torch.zeros(50)
    optimizer = torch.optim.AdamW([parameter], lr=1e-2, weight_decay=0.1)
    for step in range(1, 5):
        parameter.grad = torch.randn(50)
        optimizer.step()
        numbers = AdamW(lr=1e-2, step=step, weight_decay=0.1)
        reference.adamw_step(master, mean, square, parameter.grad, None, numbers)
    torch.testing.assert_close(master, parameter.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("count", [1, 16, 1000, 70_001])
@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("writes", [True, False], ids=["weight", ""])
def test_the_kernel_is_the_reference(count: int, grad_dtype: torch.dtype, writes: bool) -> None:
    numbers = AdamW(lr=3e-3, step=7, weight_decay=0.1, grad_scale=0.3)
    grad = torch.randn(count).to(grad_dtype)
    want, got = state(count), state(count)
    weights = [torch.empty(count, dtype=torch.bfloat16) if writes else None for _ in range(2)]
    squares = reference.adamw_step(*want, grad, weights[0], numbers)
    kernel = choose("adamw_step", "cpu", forced="cpu").function()
    assert kernel(*got, grad, weights[1], numbers) == pytest.approx(squares, rel=1e-5)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    if writes:
        assert torch.equal(weights[1], got[0].bfloat16())


@pytest.mark.parametrize("shift", [0, 1, 32], ids=["lines", "odd", "next line"])
def test_bits_depend_on_neither_threads_nor_place(shift: int) -> None:
    count, numbers, before = 40_000, AdamW(lr=1e-3, step=2), torch.get_num_threads()
    grad, kernel = state(count, seed=1)[0], choose("adamw_step", "cpu", forced="cpu").function()
    alone, moved = state(count), state(count)
    weights = torch.empty(count, dtype=torch.bfloat16), torch.empty(count + 64, dtype=torch.bfloat16)[shift:][:count]
    torch.set_num_threads(1)
    squares = kernel(*alone, grad, weights[0], numbers)
    torch.set_num_threads(before)
    assert kernel(*moved, grad, weights[1], numbers) == squares
    assert all(torch.equal(a, b) for a, b in zip((*alone, weights[0]), (*moved, weights[1]), strict=True))


def test_a_bad_gradient_shows_in_the_sum() -> None:
    grad = torch.randn(100)
    grad[50] = float("nan")
    kernel = choose("adamw_step", "cpu", forced="cpu").function()
    assert not torch.isfinite(torch.tensor(kernel(*state(100), grad, None, AdamW(lr=1e-3, step=1))))
