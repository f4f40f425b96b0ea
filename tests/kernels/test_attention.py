"""Attention kernels against float64: odd shapes, strides, masks, windows; parts that merge; rows that see nothing."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from kernel_errors import assert_near
from torch.nn import functional
from transformers import DynamicCache

from offload.kernels import choose, reference

DTYPES = (torch.bfloat16, torch.float32)
SHAPES = [  # batch, heads, kv heads, tokens, head dimension
    (1, 1, 1, 1, 16),
    (2, 4, 1, 63, 64),
    (1, 9, 3, 257, 80),
    (2, 8, 8, 300, 96),
    (1, 8, 2, 700, 128),
    (1, 14, 2, 130, 256),
    (3, 5, 1, 65, 48),
]
decode = choose("decode_attention", "cpu", forced="cpu")
attend: Callable[..., tuple[torch.Tensor, torch.Tensor]] = decode.function()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def made(
    batch: int,
    heads: int,
    kv_heads: int,
    tokens: int,
    dim: int,
    *,
    kv: torch.dtype,
    of_q: torch.dtype,
    queries: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q = torch.randn(batch, heads, *([queries] if queries else []), dim).to(of_q)
    return q, torch.randn(batch, kv_heads, tokens, dim).to(kv), torch.randn(batch, kv_heads, tokens, dim).to(kv)


def assert_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, what: str, **options: Any) -> None:
    """Holds the kernel to the reference in float64."""
    options = {"scale": q.shape[-1] ** -0.5, **options}
    assert decode.refuses()(q, k, v, **options) is None
    out, lse = attend(q, k, v, **options)
    exact, exact_lse = reference.decode_attention(q.double(), k.double(), v.double(), **options)
    assert out.dtype == q.dtype
    assert out.shape == q.shape
    assert lse.dtype == torch.float32
    # weights of float32 scores: as many roundings of them as a score is large
    assert_near(out, exact, roundings=1 if q.dtype == torch.bfloat16 else 64, what=what, sums=4 * q.shape[-1])
    finite = exact_lse > -math.inf
    assert torch.equal(lse > -math.inf, finite)
    torch.testing.assert_close(lse[finite], exact_lse[finite], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kv", DTYPES, ids=str)
@pytest.mark.parametrize("of_q", DTYPES, ids=str)
def test_it_is_near_the_exact_result(shape: tuple[int, ...], kv: torch.dtype, of_q: torch.dtype) -> None:
    assert_attention(*made(*shape, kv=kv, of_q=of_q), f"{of_q} over {kv}")


@pytest.mark.parametrize("kv", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 1, 5, 64, 300])
@pytest.mark.parametrize("softcap", [None, 0.5, 30.0])
@pytest.mark.parametrize("queries", [0, 1, 3, 6])
def test_windows_caps_and_several_queries(
    kv: torch.dtype, window: int | None, softcap: float | None, queries: int
) -> None:
    q, k, v = made(2, 6, 2, 333, 64, kv=kv, of_q=kv, queries=queries)
    assert_attention(q, k, v, f"{kv} window {window} cap {softcap}", window=window, softcap=softcap)


@pytest.mark.parametrize("queries", [0, 2])
@pytest.mark.parametrize("window", [None, 40])
def test_padding_and_lengths(queries: int, window: int | None) -> None:
    q, k, v = made(5, 4, 2, 400, 64, kv=torch.bfloat16, of_q=torch.float32, queries=queries)
    first, length = torch.tensor([0, 3, 17, 399, 200]), torch.tensor([400, 4, 290, 400, 200])
    for row in range(5):  # what is left out is never looked at
        k[row, :, : first[row]] = v[row, :, : first[row]] = float("nan")
        k[row, :, length[row] :] = v[row, :, length[row] :] = float("nan")
    options = {"scale": 0.125, "window": window, "first": first, "length": length}
    out, lse = attend(q, k, v, **options)
    exact, exact_lse = reference.decode_attention(
        q.double(), k.double().nan_to_num(), v.double().nan_to_num(), **options
    )
    assert_near(out, exact, roundings=64, what="padded", sums=256)
    torch.testing.assert_close(lse, exact_lse, rtol=2e-6, atol=2e-6)
    assert torch.equal(lse[4], torch.full_like(lse[4], -math.inf))
    assert not out[4].any()
    for row in range(4):  # a sequence gives the same bits alone, without its padding
        own = slice(int(first[row]), int(length[row]))
        alone = attend(q[row : row + 1], k[row : row + 1, :, own], v[row : row + 1, :, own], scale=0.125, window=window)
        assert torch.equal(alone[0][0], out[row])
        assert torch.equal(alone[1][0], lse[row])


def test_sequences_in_one_long_run() -> None:
    """Each has a part of the same keys and values, and gives the bits that it gives alone."""
    q, k, v = made(1, 4, 2, 3000, 64, kv=torch.bfloat16, of_q=torch.bfloat16)
    q = torch.randn(3, 4, 64).bfloat16()
    first, length = torch.tensor([0, 700, 2400]), torch.tensor([700, 701, 3000])
    keys, values = k.expand(3, -1, -1, -1), v.expand(3, -1, -1, -1)
    out, lse = attend(q, keys, values, scale=0.125, first=first, length=length, most=700)
    for row in range(3):
        own = slice(int(first[row]), int(length[row]))
        alone = attend(q[row : row + 1], k[:, :, own], v[:, :, own], scale=0.125)
        assert torch.equal(alone[0][0], out[row])
        assert torch.equal(alone[1][0], lse[row])
    with pytest.raises(ValueError, match="more than the 699 tokens"):
        attend(q, keys, values, scale=0.125, first=first, length=length, most=699)


def test_a_transformers_cache_where_it_lies() -> None:
    cache = DynamicCache()
    for tokens in (90, 1):
        fresh = [torch.randn(2, tokens, 2, 64).bfloat16().transpose(1, 2) for _ in range(2)]
        k, v = cache.update(*fresh, 0)
    q = torch.randn(2, 1, 8, 64).bfloat16().transpose(1, 2)
    assert_attention(q, k, v, "cache")
    by_token = torch.randn(2, 91, 2, 2, 64).bfloat16()  # [batch, tokens, keys or values, heads, dimension]
    assert_attention(q, by_token[:, :, 0].transpose(1, 2), by_token[:, :, 1].transpose(1, 2), "strided")


@pytest.mark.parametrize("kv", DTYPES, ids=str)
def test_bits_depend_on_neither_threads_nor_neighbours(kv: torch.dtype, threads: Callable[[int], None]) -> None:
    q, k, v = made(3, 8, 2, 1000, 64, kv=kv, of_q=kv)
    threads(1)
    out, lse = attend(q, k, v, scale=0.125)
    threads(2)
    again = attend(q, k, v, scale=0.125)
    assert torch.equal(again[0], out)
    assert torch.equal(again[1], lse)
    for row in range(3):
        alone = attend(q[row : row + 1], k[row : row + 1], v[row : row + 1], scale=0.125)
        assert torch.equal(alone[0][0], out[row])


@pytest.mark.parametrize("implementation", ["torch", "cpu"])
def test_parts_merge(implementation: str) -> None:
    function = choose("decode_attention", "cpu", forced=implementation).function()
    q, k, v = made(2, 4, 2, 500, 64, kv=torch.float32, of_q=torch.float32)
    length = torch.tensor([500, 130])  # nothing of the second sequence is in the last part
    whole = function(q, k, v, scale=0.125, length=length)
    cuts = [(0, 100), (100, 200), (200, 500)]
    parts = [function(q, k[:, :, a:b], v[:, :, a:b], scale=0.125, length=(length - a).clamp(0, b - a)) for a, b in cuts]
    out, lse = reference.merge_attention([part[0] for part in parts], [part[1] for part in parts])
    torch.testing.assert_close(out, whole[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, whole[1], rtol=1e-6, atol=1e-6)


def test_nothing_merges_to_nothing() -> None:
    nothing = torch.zeros(1, 2, 16), torch.full((1, 2), -math.inf)
    out, lse = reference.merge_attention(*zip(nothing, nothing, strict=True))
    assert not out.any()
    assert torch.equal(lse, nothing[1])


def test_infinite_and_large_scores() -> None:
    q, k, v = made(1, 4, 1, 200, 64, kv=torch.float32, of_q=torch.float32)
    assert_attention(100 * q, k, v, "large")
    k[0, 0, 7] = -math.inf
    q = q.abs()
    assert_attention(q, k, v, "minus infinity")
    v[0, 0, 3] = float("nan")
    assert attend(q, k, v, scale=0.125)[0].isnan().all()
    k[0, 0, 9], v[0, 0, 3] = float("nan"), 0
    assert attend(q, k, v, scale=0.125)[0].isnan().all()


def test_the_reference_is_torch_s_attention() -> None:
    q, k, v = made(2, 6, 2, 77, 64, kv=torch.float32, of_q=torch.float32, queries=77)
    want = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(reference.decode_attention(q, k, v, scale=0.125)[0], want)


def test_it_says_what_it_does_not_take() -> None:
    q, k, v = made(1, 4, 2, 10, 64, kv=torch.bfloat16, of_q=torch.bfloat16)
    refuses = decode.refuses()
    assert refuses(q, k, v, scale=1.0) is None
    assert "multiple of 16" in str(refuses(q[..., :40], k[..., :40], v[..., :40], scale=1.0))
    assert "float64" in str(refuses(q, k.double(), v.double(), scale=1.0))
    assert "shapes" in str(refuses(q[:, :3], k, v, scale=1.0))
    with pytest.raises(ValueError, match="length"):
        attend(q, k, v, scale=1.0, length=torch.tensor([11]))
    with pytest.raises(ValueError, match="first"):
        attend(q, k, v, scale=1.0, first=torch.tensor([-1]))
