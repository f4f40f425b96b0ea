"""y = x W^T + b with W in 8 bits and a scale for each output; sums in float32.

Up to FEW_ROWS rows, each thread multiplies what it loaded by every row; beyond, tensor cores do (see numbers.py). Rows
do not change one another's bits on either side of that line.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from offload.kernels.formats.int8 import Int8Weight
from offload.kernels.gpu import parts
from offload.kernels.gpu.launch import misplaced, on
from offload.kernels.gpu.numbers import dot_whole, rounded

FEW_ROWS = 4
MAX_ROWS = 64  # beyond, unpacking once and torch's matrix product cost less
TILE_ROWS = 16  # of x that go through tensor cores at once


@dataclass(frozen=True)
class Tiles:
    """How a matrix is divided: programs take `outputs` of it and `steps` times `inputs`."""

    outputs: int
    inputs: int
    parts: int
    steps: int


def tiles(outputs: int, inputs: int, rows: int) -> Tiles:
    """The division of a matrix; `rows` matters only as more than FEW_ROWS or not."""
    if rows > FEW_ROWS:
        return Tiles(64, 64, *parts.split(triton.cdiv(outputs, 64), triton.cdiv(inputs, 64)))
    block = parts.block_for(outputs, (16, 8))
    return Tiles(block, 256, *parts.split(triton.cdiv(outputs, block), triton.cdiv(inputs, 256)))


@triton.jit
def _store(y, part, bias, v, row, n, rows, outputs):
    """One row's outputs, to the result or to its part."""
    if bias is not None:
        v += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)
    here = n < tl.where(row < rows, outputs, 0)
    tl.store(y + (part * rows + row) * outputs + n, rounded(v, y.dtype.element_ty), mask=here)


@triton.jit
def _row(x, row, rows, k, last, inputs):
    here = k < tl.where(row < rows, last, 0)
    return tl.load(x + row * inputs + k, mask=here, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _number(q):
    """q / 256 of bytes: put where a mantissa begins, under the exponent of 1 and with the sign turned, 1.5 + q / 256.

    Converting costs more: int8 weights come faster than an H100 turns integers into floats.
    """
    bits = (q.to(tl.uint8, bitcast=True).to(tl.int32) << 15) ^ 0x3FC00000
    return bits.to(tl.float32, bitcast=True) - 1.5


@triton.jit(do_not_specialize=["rows", "steps"])
def _few(
    x, q, scale, bias, y, rows, outputs, inputs, steps, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    first = part * steps * BLOCK_K
    last = tl.minimum(inputs, first + steps * BLOCK_K)
    row_q = q + n.to(tl.int64)[:, None] * inputs
    # A sum for each weight that a thread holds, and one row of x after the other: how many there are changes no order.
    sum0 = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    sum1 = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    sum2 = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    sum3 = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    k = first + tl.arange(0, BLOCK_K)
    ahead = tl.load(row_q + k[None, :], mask=(n < outputs)[:, None] & (k < last)[None, :], other=0)
    for _ in range(steps):
        w, here = _number(ahead), k
        k += BLOCK_K
        ahead = tl.load(row_q + k[None, :], mask=(n < outputs)[:, None] & (k < last)[None, :], other=0)  # next turn's
        sum0 += w * _row(x, 0, rows, here, last, inputs)
        if ROWS > 1:
            sum1 += w * _row(x, 1, rows, here, last, inputs)
        if ROWS > 2:
            sum2 += w * _row(x, 2, rows, here, last, inputs)
            sum3 += w * _row(x, 3, rows, here, last, inputs)
    s = tl.load(scale + n, mask=n < outputs, other=0.0) * 256
    _store(y, part, bias, tl.sum(sum0, 1) * s, 0, n, rows, outputs)
    if ROWS > 1:
        _store(y, part, bias, tl.sum(sum1, 1) * s, 1, n, rows, outputs)
    if ROWS > 2:
        _store(y, part, bias, tl.sum(sum2, 1) * s, 2, n, rows, outputs)
        _store(y, part, bias, tl.sum(sum3, 1) * s, 3, n, rows, outputs)


@triton.jit(do_not_specialize=["rows", "steps"])
def _many(
    x, q, scale, bias, y, rows, outputs, inputs, steps, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    first = part * steps * BLOCK_K
    last = tl.minimum(inputs, first + steps * BLOCK_K)
    row_q = q + n.to(tl.int64)[:, None] * inputs
    total = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for at in range(first, last, BLOCK_K):
        k = at + tl.arange(0, BLOCK_K)
        w = tl.load(row_q + k[None, :], mask=(n < outputs)[:, None] & (k < last)[None, :], other=0)
        rows_x = x + row[:, None] * inputs + k[None, :]
        total += dot_whole(tl.load(rows_x, mask=(row < rows)[:, None] & (k < last)[None, :], other=0.0), tl.trans(w))
    v = total * tl.load(scale + n, mask=n < outputs, other=0.0)[None, :]
    _store(y, part, bias, v, row[:, None], n[None, :], rows, outputs)


def refuses(x: torch.Tensor, weight: Int8Weight, bias: torch.Tensor | None = None) -> str | None:
    """Why `linear_int8` would not take these; None when it does."""
    if (why := misplaced(x, weight.q, weight.scale, bias)) is not None:
        return why
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"activations in {x.dtype}"
    if not (weight.q.is_contiguous() and weight.scale.is_contiguous()):
        return "not contiguous"
    if x.shape[-1] == 0 or not 0 < x.numel() // x.shape[-1] <= MAX_ROWS:
        return f"more than {MAX_ROWS} rows, or none"
    return None


def linear_int8(x: torch.Tensor, weight: Int8Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """See offload.kernels.reference.linear_int8; at most MAX_ROWS rows of x."""
    outputs, inputs = weight.q.shape
    flat = x.reshape(-1, inputs).contiguous()
    rows = len(flat)
    t = tiles(outputs, inputs, rows)
    y = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    sums = parts.place_for(y, t.parts)
    blocks = triton.cdiv(outputs, t.outputs)
    first_bias = bias if t.parts == 1 else None
    with on(x):
        if rows <= FEW_ROWS:
            _few[(blocks, t.parts)](
                flat, weight.q, weight.scale, first_bias, sums, rows, outputs, inputs, t.steps,
                ROWS=triton.next_power_of_2(rows), BLOCK_N=t.outputs, BLOCK_K=t.inputs,
            )  # fmt: skip
        else:
            _many[(blocks, t.parts, triton.cdiv(rows, TILE_ROWS))](
                flat, weight.q, weight.scale, first_bias, sums, rows, outputs, inputs, t.steps,
                ROWS=TILE_ROWS, BLOCK_N=t.outputs, BLOCK_K=t.inputs,
            )  # fmt: skip
        parts.add(sums, bias, y)
    return y.view(*x.shape[:-1], outputs)
