"""Packing and unpacking kernels give the bits of the formats in plain torch, at odd shapes and sizes of weights."""

from dataclasses import fields
from typing import Any

import pytest
import torch

from offload.kernels import choose, reference

SHAPES = [(1, 16), (3, 64), (5, 70), (9, 576), (2, 33), (70, 128), (300, 200)]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def matrix(outputs: int, inputs: int, kind: str = "normal", dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    torch.manual_seed(outputs * inputs)
    weight = torch.randn(outputs, inputs)
    if kind == "wide":
        weight = weight * torch.exp(3 * torch.randn_like(weight))
    elif kind == "ties":  # few values, so that a group has several extremes of either sign, and rows of zeros
        weight = weight.sign() * (weight.abs() > 1)
        weight[0] = -0.0
    return weight.clamp(-6e4, 6e4).to(dtype)  # within float16


def assert_same(got: Any, want: Any) -> None:
    for field in fields(want):
        mine, theirs = getattr(got, field.name), getattr(want, field.name)
        if not isinstance(theirs, torch.Tensor):
            assert mine == theirs, field.name
            continue
        assert mine.dtype == theirs.dtype, field.name
        assert mine.shape == theirs.shape, field.name
        assert torch.equal(mine.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8)), field.name


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["normal", "wide", "ties"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_has_the_bits_of_the_reference(shape: tuple[int, int], kind: str, dtype: torch.dtype) -> None:
    weight = matrix(*shape, kind, dtype)
    packed = choose("quantize_int8", "cpu", forced="cpu").function()(weight)
    assert_same(packed, reference.quantize_int8(weight))
    unpack = choose("dequantize_int8", "cpu", forced="cpu").function()
    for result in (torch.float32, torch.bfloat16):
        assert torch.equal(unpack(packed, result), reference.dequantize_int8(packed, result))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["normal", "wide", "ties"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("symmetric", [False, True], ids=["", "symmetric"])
def test_int4_has_the_bits_of_the_reference(
    shape: tuple[int, int], kind: str, dtype: torch.dtype, group: int, symmetric: bool
) -> None:
    weight = matrix(*shape, kind, dtype)
    packed = choose("quantize_int4", "cpu", forced="cpu").function()(weight, group, symmetric=symmetric)
    assert_same(packed, reference.quantize_int4(weight, group, symmetric=symmetric))
    unpack = choose("dequantize_int4", "cpu", forced="cpu").function()
    for result in (torch.float32, torch.bfloat16):
        assert torch.equal(unpack(packed, result), reference.dequantize_int4(packed, result))


@pytest.mark.parametrize("shape", [*SHAPES, (1, 1), (3, 5)], ids=str)
@pytest.mark.parametrize("kind", ["normal", "wide", "ties", "any bits"])
def test_lossless_has_the_bits_of_the_reference(shape: tuple[int, int], kind: str) -> None:
    weight = matrix(*shape, kind)
    if kind == "any bits":
        weight = torch.randint(-(2**15), 2**15, shape).to(torch.int16).view(torch.bfloat16)
    pack = choose("pack_lossless", "cpu", forced="cpu").function()
    assert_same(pack(weight), reference.pack_lossless(weight))
    assert_same(pack(weight, 255), reference.pack_lossless(weight, 255))


@pytest.mark.parametrize("op", ["quantize_int8", "quantize_int4", "pack_lossless"])
def test_some_rows_of_a_wider_matrix_pack_where_they_lie(op: str) -> None:
    weight = matrix(50, 300)[10:30, 100:270]
    choice = choose(op, "cpu", forced="cpu")
    assert choice.refuses()(weight) is None
    assert_same(choice.function()(weight), choose(op, "cpu", forced="torch").function()(weight))


def test_lossless_packs_part_by_part() -> None:
    weight = matrix(40, 100, "wide")
    whole = reference.pack_lossless(weight)
    pack = choose("pack_lossless", "cpu", forced="cpu").function()
    parts = [pack(part, whole.largest) for part in weight.split(16)]
    for plane in ("low", "codes", "patch_input", "patch_exponent"):
        assert torch.equal(torch.cat([getattr(part, plane) for part in parts]), getattr(whole, plane)), plane


@pytest.mark.parametrize("op", ["dequantize_int8", "dequantize_int4"])
@pytest.mark.parametrize("implementation", ["torch", "cpu"])
def test_results_go_where_they_are_told(op: str, implementation: str) -> None:
    packed = getattr(reference, op[2:])(matrix(9, 70))
    out = torch.empty(9, 70, dtype=torch.bfloat16)
    result = choose(op, "cpu", forced=implementation).function()(packed, torch.bfloat16, out)
    assert result is out
    assert torch.equal(out, getattr(reference, op)(packed).bfloat16())


@pytest.mark.parametrize("op", ["quantize_int8", "quantize_int4", "pack_lossless"])
def test_they_say_what_they_do_not_take(op: str) -> None:
    refuses = choose(op, "cpu", forced="cpu").refuses()
    assert "float64" in str(refuses(torch.ones(2, 64).double()))
    assert refuses(torch.ones(64).bfloat16()) == refuses(torch.ones(2, 2, 2).bfloat16())
    assert "one piece" in str(refuses(torch.ones(64, 64).bfloat16().T))
