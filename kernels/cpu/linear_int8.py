"""y = x W^T + b with W in 8 bits and a scale for each output: bf16 holds 8 bits exactly, so sums are as for bf16."""

from __future__ import annotations

import torch

from offload.kernels.cpu.dot import make_products
from offload.kernels.cpu.linear import step_of
from offload.kernels.cpu.memory import claim, get_f32, get_i8, get_i64, load_i8_pairs, put_f32
from offload.kernels.cpu.several import Call, run
from offload.kernels.cpu.split import in_bf16, joined
from offload.kernels.cpu.team import team_function
from offload.kernels.formats.int8 import Int8Weight

MAX_ROWS = 16  # beyond, unpacking once and torch's matrix product cost less

_multiply = make_products(load_i8_pairs, get_i8, put_f32, get_f32, by_pairs=True, nbytes=32)


@team_function("linear_int8")
def _linear_int8(block: int) -> None:
    pieces, step = get_i64(block, 1), get_i64(block, 2)
    x, w, scale, y = get_i64(block, 3), get_i64(block, 4), get_i64(block, 5), get_i64(block, 6)
    rows, outputs, inputs = get_i64(block, 7), get_i64(block, 8), get_i64(block, 9)
    piece = claim(block)
    while piece < pieces:
        first = piece * step
        last = min(outputs, first + step)
        _multiply(w + first * inputs, inputs, first, last, x, rows, outputs, inputs, scale, 0, y)
        piece = claim(block)


def refuses(x: torch.Tensor, weight: Int8Weight, bias: torch.Tensor | None = None) -> str | None:
    """Why `linear_int8` would not take these; None when it does."""
    if x.device.type != "cpu":
        return f"on {x.device}"
    if not weight.q.is_contiguous():
        return "not contiguous"
    if x.shape[-1] == 0 or not 0 < x.numel() // x.shape[-1] <= MAX_ROWS:
        return f"more than {MAX_ROWS} rows, or none"
    return None


def linear_int8(x: torch.Tensor, weight: Int8Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """See offload.kernels.reference.linear_int8; at most MAX_ROWS rows of x."""
    return run([plan(x, weight, bias)])[0]


def plan(x: torch.Tensor, weight: Int8Weight, bias: torch.Tensor | None = None) -> Call:
    """That product, to be run with others."""
    outputs, inputs = weight.q.shape
    parts = in_bf16(x.reshape(-1, inputs))
    y = torch.empty(len(parts), outputs)
    step = step_of(inputs, outputs)
    places = parts.data_ptr(), weight.q.data_ptr(), weight.scale.data_ptr(), y.data_ptr()
    shape = *x.shape[:-1], outputs
    arguments = step, *places, len(parts), outputs, inputs
    return Call(_linear_int8, -(-outputs // step), arguments, (parts,), lambda: joined(y, x.dtype, bias).view(shape))
