"""The gated first half of a feed-forward layer, in every format."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_errors import assert_near
from torch.nn import functional

from offload.kernels import choose
from offload.kernels.formats.int4 import dequantize_int4, quantize_int4
from offload.kernels.formats.int8 import dequantize_int8, quantize_int8
from offload.kernels.formats.lossless import pack_lossless, unpack_lossless

Pack = Callable[[torch.Tensor], Any]
FORMATS: dict[str, tuple[str, Pack, Callable[[Any], torch.Tensor], torch.dtype]] = {
    "bf16": ("linear", torch.Tensor.bfloat16, torch.Tensor.double, torch.bfloat16),
    "fp16": ("linear", torch.Tensor.half, torch.Tensor.double, torch.float16),
    "fp32": ("linear", torch.Tensor.float, torch.Tensor.double, torch.float32),
    "int8": ("linear_int8", quantize_int8, dequantize_int8, torch.bfloat16),
    "int4": ("linear_int4", quantize_int4, dequantize_int4, torch.float32),
    "lossless": ("linear_lossless", lambda w: pack_lossless(w.bfloat16()), unpack_lossless, torch.bfloat16),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("implementation", ["torch", "cpu"])
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 70, 33), (3, 5, 576)])
def test_it_is_near_the_exact_value(name: str, implementation: str, rows: int, outputs: int, inputs: int) -> None:
    torch.manual_seed(0)
    _, pack, unpack, dtype = FORMATS[name]
    x = torch.randn(rows, inputs).to(dtype)
    gate, up = (pack(torch.randn(outputs, inputs) / inputs**0.5) for _ in range(2))
    left, right = (functional.linear(x.double(), unpack(weight).double()) for weight in (gate, up))
    got = choose("gate_up_silu", "cpu", forced=implementation).function()(x, gate, up)
    assert_near(got, functional.silu(left) * right, roundings=8, what=f"gate_up_silu {name}", sums=16 * inputs)


@pytest.mark.parametrize("name", FORMATS)
def test_bits_are_those_of_the_parts(name: str) -> None:
    torch.manual_seed(0)
    op, pack, _, dtype = FORMATS[name]
    x = torch.randn(2, 3, 128).to(dtype)
    gate, up = pack(torch.randn(40, 128)), pack(torch.randn(40, 128))
    linear = choose(op, "cpu", forced="cpu").function()
    got = choose("gate_up_silu", "cpu", forced="cpu").function()(x, gate, up)
    assert torch.equal(got, functional.silu(linear(x, gate)) * linear(x, up))


def test_formats_mix_and_too_many_rows_are_refused() -> None:
    refuses = choose("gate_up_silu", "cpu", forced="cpu").refuses()
    plain = torch.randn(8, 64).bfloat16()
    packed = pack_lossless(plain)
    assert refuses(torch.randn(1, 64).bfloat16(), plain, packed) is None
    assert "rows" in str(refuses(torch.randn(1000, 64).bfloat16(), plain, packed))
    assert refuses(torch.randn(1, 64), plain, packed)
