"""Several matrices in one call: the bits of each of them alone."""

import pytest
import torch

from offload.kernels import choose
from offload.kernels.formats.int4 import quantize_int4
from offload.kernels.formats.int8 import quantize_int8
from offload.kernels.formats.lossless import pack_lossless

linears, alone = (choose(op, "cpu", forced="cpu") for op in ("linears", "linear"))


@pytest.mark.parametrize("rows", [1, 3])
def test_bits_are_those_of_each_alone(rows: int) -> None:
    torch.manual_seed(0)
    x, bias = torch.randn(2, rows, 96).bfloat16()[:1], torch.randn(7).bfloat16()
    plain = [torch.randn(outputs, 96).bfloat16() for outputs in (300, 7, 64)]
    got = linears.function()(x, [(plain[0], None), (plain[1], bias), (plain[2], None)])
    expected = [alone.function()(x, weight, b) for weight, b in zip(plain, (None, bias, None), strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_formats_mix() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 128).bfloat16()
    matrices = [torch.randn(48, 128) for _ in range(4)]
    packs = [torch.Tensor.bfloat16, lambda w: pack_lossless(w.bfloat16()), quantize_int8, quantize_int4]
    ops = ["linear", "linear_lossless", "linear_int8", "linear_int4"]
    weights = [pack(matrix) for pack, matrix in zip(packs, matrices, strict=True)]
    got = linears.function()(x, [(weight, None) for weight in weights])
    for y, op, weight in zip(got, ops, weights, strict=True):
        assert torch.equal(y, choose(op, "cpu", forced="cpu").function()(x, weight))
    plain = choose("linears", "cpu", forced="torch").function()(x, [(weight, None) for weight in weights])
    for y, expected in zip(got, plain, strict=True):
        torch.testing.assert_close(y, expected, rtol=0.02, atol=0.1)


def test_too_many_rows_for_one_are_refused() -> None:
    plain = torch.randn(8, 64).bfloat16()
    rows = torch.randn(9, 64).bfloat16()
    assert "rows" in str(linears.refuses()(rows, [(quantize_int8(plain.float()), None), (plain, None)]))
