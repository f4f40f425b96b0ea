"""Norm, rotary embedding and gate against transformers' own."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from offload.kernels import choose

DTYPES = (torch.bfloat16, torch.float32)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 16), (2, 3, 100), (70, 576), (1, 1, 4096)], ids=str)
@pytest.mark.parametrize("implementation", ["torch", "cpu"])
def test_rms_norm_is_transformers(dtype: torch.dtype, shape: tuple[int, ...], implementation: str) -> None:
    norm = LlamaRMSNorm(shape[-1], eps=1e-5).to(dtype)
    norm.weight.data.normal_()
    x = 3 * torch.randn(*shape).to(dtype)
    choice = choose("rms_norm", "cpu", forced=implementation)
    assert choice.refuses()(x, norm.weight.data, 1e-5) is None
    got, want = choice.function()(x, norm.weight.data, 1e-5), norm(x).detach()
    if dtype == torch.float32 and implementation == "cpu":
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)  # the sum of squares has an order of its own
    elif implementation == "cpu":
        torch.testing.assert_close(got, want, rtol=2.0**-7, atol=0)  # which may round a quotient to its neighbour
        assert float((got != want).float().mean()) < 0.01
    else:
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "tokens", "dim"), [(1, 4, 2, 1, 64), (2, 9, 3, 37, 80), (3, 2, 2, 5, 128)]
)
@pytest.mark.parametrize("implementation", ["torch", "cpu"])
@pytest.mark.parametrize("shared", [False, True], ids=["", "one angle for all"])
def test_rotary_is_transformers_bit_by_bit(
    dtype: torch.dtype, batch: int, heads: int, kv_heads: int, tokens: int, dim: int, implementation: str, shared: bool
) -> None:
    q, k = (torch.randn(batch, tokens, n, dim).to(dtype).transpose(1, 2) for n in (heads, kv_heads))
    angles = torch.randn(1 if shared else batch, tokens, dim)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    choice = choose("rotary", "cpu", forced=implementation)
    assert choice.refuses()(q, k, cos, sin) is None
    for got, want in zip(choice.function()(q, k, cos, sin), apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 16), (3, 37), (9, 2, 8192)], ids=str)
def test_silu_mul_is_silu_times_up(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    gate, up = (4 * torch.randn(*shape)).to(dtype), torch.randn(*shape).to(dtype)
    choice = choose("silu_mul", "cpu", forced="cpu")
    assert choice.refuses()(gate, up) is None
    got, want = choice.function()(gate, up), torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(got, want, rtol=2.0**-7 if dtype == torch.bfloat16 else 1e-6, atol=1e-30)
    assert float((got != want).float().mean()) < (0.001 if dtype == torch.bfloat16 else 0.9)


def test_silu_mul_at_the_ends_of_its_range() -> None:
    ends = [0.0, -0.0, 88.0, -88.0, 1e30, -1e30, float("inf"), float("nan")] * 2
    gate, up = torch.tensor(ends), torch.full((16,), 2.0)
    got = choose("silu_mul", "cpu", forced="cpu").function()(gate, up)
    want = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-30, equal_nan=True)


def test_they_say_what_they_do_not_take() -> None:
    gate = choose("silu_mul", "cpu", forced="cpu").refuses()
    assert "shapes" in str(gate(torch.ones(2, 16), torch.ones(2, 32)))
    assert "not contiguous" in str(gate(torch.ones(32, 16).T, torch.ones(16, 32)))
    norm = choose("rms_norm", "cpu", forced="cpu").refuses()
    assert "fewer than 16" in str(norm(torch.ones(2, 8), torch.ones(8), 1e-5))
    assert "float32" in str(norm(torch.ones(2, 32).bfloat16(), torch.ones(32), 1e-5))
    rotary = choose("rotary", "cpu", forced="cpu").refuses()
    q, angles = torch.ones(1, 2, 3, 64), torch.ones(1, 3, 32)
    assert "angles" in str(rotary(q, q, angles, angles))
