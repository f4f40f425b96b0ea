"""12 bits a weight and every bit back, at odd shapes and for weights of all sizes."""

import pytest
import torch

from offload.kernels import choose
from offload.kernels.formats.lossless import pack_lossless

SHAPES = [(1, 1), (3, 64), (5, 70), (9, 576), (2, 33), (4, 128)]


def matrix(outputs: int, inputs: int, kind: str) -> torch.Tensor:
    torch.manual_seed(outputs * inputs)
    if kind == "any bits":
        return torch.randint(-(2**15), 2**15, (outputs, inputs)).to(torch.int16).view(torch.bfloat16)
    weight = torch.randn(outputs, inputs)
    return (weight * torch.exp(4 * torch.randn_like(weight)) if kind == "wide" else weight).bfloat16()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["normal", "wide", "any bits"])
@pytest.mark.parametrize("implementation", ["torch", "cpu"])
def test_every_bit_comes_back(shape: tuple[int, int], kind: str, implementation: str) -> None:
    weight = matrix(*shape, kind)
    unpack = choose("unpack_lossless", "cpu", forced=implementation).function()
    assert torch.equal(unpack(pack_lossless(weight)).view(torch.int16), weight.view(torch.int16))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [1, 4, 6])
def test_products_equal_those_of_the_plain_matrix(shape: tuple[int, int], rows: int) -> None:
    weight = matrix(*shape, "wide")
    x, bias = torch.randn(rows, shape[1]).bfloat16(), torch.randn(shape[0]).bfloat16()
    packed = choose("linear_lossless", "cpu", forced="cpu").function()(x, pack_lossless(weight), bias)
    assert torch.equal(packed, choose("linear", "cpu", forced="cpu").function()(x, weight, bias))


def test_normal_weights_take_three_quarters() -> None:
    weight = torch.randn(256, 1024).bfloat16()
    assert pack_lossless(weight).nbytes < 0.77 * weight.nbytes


def test_damaged_patches_reach_no_other_memory() -> None:
    """What they say of places is out of bounds; the rest of the matrix is right."""
    weight = matrix(9, 130, "wide")
    packed = pack_lossless(weight)
    packed.patch_input[::2] = 2**30
    packed.patch_input[1::2] = -(2**30)
    packed.patch_start[-1] = 2**31 - 1
    packed.patch_start[0] = -(2**31)
    unpack = choose("unpack_lossless", "cpu", forced="cpu").function()
    area = torch.full((11, 130), 7, dtype=torch.bfloat16)
    unpack(packed, area[1:10])
    assert bool((area[[0, 10]] == 7).all())
    is_plain = unpack(pack_lossless(weight)) == area[1:10]
    assert int((~is_plain).sum()) <= len(packed.patch_input)
    x = torch.randn(1, 130).bfloat16()
    choose("linear_lossless", "cpu", forced="cpu").function()(x, packed)
