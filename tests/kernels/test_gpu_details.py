"""What the Triton kernels promise beside results: bits that no neighbour changes, reasons, divisions that cover."""

import math
from typing import Any

import pytest
import torch
from gpu_cases import moved
from triton_kernels import INTERPRETED, place

from offload.kernels import choose
from offload.kernels.formats.int4 import quantize_int4
from offload.kernels.formats.int8 import quantize_int8
from offload.kernels.gpu import decode_attention, gather_pages, launch, linear_int4, linear_int8, parts
from offload.kernels.reference import AdamW

__all__ = ["place"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def op(name: str) -> Any:
    return choose(name, "cuda", forced="gpu").function()


@pytest.mark.parametrize("name", ["linear_int8", "linear_int4"])
def test_no_row_changes_another(name: str, place: str) -> None:
    pack = quantize_int8 if name == "linear_int8" else quantize_int4
    weight = moved(pack(torch.randn(20, 700)), place)
    x = torch.randn(18, 700).bfloat16().to(place)
    few, many = op(name)(x[:4], weight), op(name)(x, weight)
    for row in range(4):
        assert torch.equal(op(name)(x[row : row + 1], weight)[0], few[row])
    assert torch.equal(op(name)(x[5:10], weight), many[5:10])
    assert torch.equal(op(name)(x.view(2, 9, 700), weight), many.view(2, 9, 20))


def test_neither_neighbours_nor_padding_change_attention(place: str) -> None:
    q, k, v = torch.randn(2, 4, 16), torch.randn(2, 2, 300, 16), torch.randn(2, 2, 300, 16)
    q, k, v = (t.bfloat16().to(place) for t in (q, k, v))
    bounds = {"first": torch.tensor([0, 20]).to(place), "length": torch.tensor([300, 290]).to(place)}
    out, lse = op("decode_attention")(q, k, v, scale=0.25, **bounds)
    alone, alone_lse = op("decode_attention")(q[1:], k[1:, :, 20:290], v[1:, :, 20:290], scale=0.25)
    assert torch.equal(out[1:], alone)
    assert torch.equal(lse[1:], alone_lse)


def test_a_query_that_sees_nothing(place: str) -> None:
    q, k = torch.randn(2, 2, 16).to(place), torch.randn(2, 1, 9, 16).to(place)
    bounds = {"first": torch.tensor([4, 0]).to(place), "length": torch.tensor([4, 9]).to(place)}
    out, lse = op("decode_attention")(q, k, k, scale=1.0, **bounds)
    assert out[0].eq(0).all()
    assert lse[0].eq(-math.inf).all()
    assert out[1].ne(0).any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, about the bad numbers
def test_a_bad_gradient_shows_in_the_sum(place: str) -> None:
    for bad in (math.nan, math.inf):
        grad = torch.ones(1500)
        grad[1400] = bad
        state = [torch.ones(1500).to(place) for _ in range(3)]
        assert not math.isfinite(op("adamw_step")(*state, grad.to(place), None, AdamW(lr=1e-3, step=1)))


def test_pages_that_are_not_there_are_zeros(place: str) -> None:
    pool = torch.ones(3, 5).to(place)
    got = op("gather_pages")(pool, torch.tensor([-1, 2, 3]).to(place))
    assert got.sum(1).tolist() == [0, 5, 0]
    assert op("gather_pages")(pool, torch.tensor([], dtype=torch.int64).to(place)).shape == (0, 5)


def test_results_go_where_they_are_wanted(place: str) -> None:
    pool, out = torch.randn(3, 5).to(place), torch.zeros(2, 5).to(place)
    assert op("gather_pages")(pool, torch.tensor([2, 0]).to(place), out) is out
    assert torch.equal(out, pool[[2, 0]])


def test_refusals_say_why(place: str) -> None:
    x = torch.randn(1, 64).to(place)
    int8, int4 = moved(quantize_int8(torch.randn(8, 64)), place), moved(quantize_int4(torch.randn(8, 64)), place)
    assert linear_int8.refuses(x, int8) is None
    assert "float64" in str(linear_int8.refuses(x.double(), int8))
    assert "64 rows" in str(linear_int4.refuses(x.expand(65, 64), int4))
    assert "rows" in str(linear_int4.refuses(x[:0], int4))
    q, k = torch.randn(1, 4, 16).to(place), torch.randn(1, 2, 9, 16).to(place)
    assert decode_attention.refuses(q, k, k, scale=1.0) is None
    assert "float64" in str(decode_attention.refuses(q.double(), k, k, scale=1.0))
    assert "contiguous" in str(decode_attention.refuses(q, k, k.mT.contiguous().mT, scale=1.0))
    assert "128 rows" in str(decode_attention.refuses(q[:, :, None].expand(1, 4, 64, 16), k, k, scale=1.0))


@pytest.mark.skipif(not INTERPRETED, reason="tensors in main memory are refused here by themselves")
def test_main_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    assert launch.misplaced(None, torch.ones(1)) == "on cpu, not on a CUDA device"
    assert launch.misplaced(torch.ones(1, device="meta"), None) == "on meta, not on a CUDA device"


@pytest.mark.parametrize("rows", [1, 4, 5, 64])
@pytest.mark.parametrize("inputs", [1, 127, 576, 4096, 16384])
@pytest.mark.parametrize("outputs", [1, 64, 1000, 4096, 128256])
def test_divisions_cover_the_matrix(outputs: int, inputs: int, rows: int) -> None:
    for tiles, width, unit in (
        (four := linear_int4.tiles(outputs, inputs, rows), four.chunks, 128),
        (eight := linear_int8.tiles(outputs, inputs, rows), eight.inputs, 1),
    ):
        step = tiles.steps * width * unit
        assert step * (tiles.parts - 1) < inputs <= step * tiles.parts
        programs = -(-outputs // tiles.outputs) * tiles.parts
        assert tiles.parts == 1 or programs <= 2 * parts.FILL  # a second kernel only where the first is small
        assert programs >= min(parts.FILL, outputs // tiles.outputs)
    assert linear_int4.tiles(outputs, inputs, 1) == linear_int4.tiles(outputs, inputs, 4)
    assert linear_int4.tiles(outputs, inputs, 5) == linear_int4.tiles(outputs, inputs, 64)


@pytest.mark.parametrize("head_dim", [1, 16, 80, 96, 128, 256])
def test_attention_blocks_hold_a_head(head_dim: int) -> None:
    tokens, wide = decode_attention.blocks(head_dim)
    assert wide >= max(16, head_dim)
    assert wide & (wide - 1) == 0
    assert decode_attention.CHUNK % tokens == 0
    assert tokens * wide <= 8192


def test_pages_are_copied_in_the_widest_words() -> None:
    assert gather_pages.word_of(4096, 64, 128) == torch.int64
    assert gather_pages.word_of(4096, 64, 132) == torch.int32
    assert gather_pages.word_of(6, 64) == torch.int16
    assert gather_pages.word_of(7) == torch.uint8
