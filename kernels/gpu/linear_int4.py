"""y = x W^T + b with W in 4 bits and a scale and an offset for each group of inputs; sums in float32.

Up to FEW_ROWS rows, a thread loads 16 bytes of packed words at a time, which hold 32 weights of one chunk, and
multiplies them by every row. Four bits become a number without a conversion: put where a mantissa begins, under the
exponent of 1, they read as 1 + q / 16. What is constant (the ones, and -8 where there is no offset) is subtracted once
for each pair of inputs, not for each weight.

Beyond, tensor cores multiply x by the whole numbers q (see numbers.py), a group at a time. Rows do not change one
another's bits on either side of that line.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from offload.kernels.formats.int4 import INT4_CHUNK, Int4Weight
from offload.kernels.gpu import parts
from offload.kernels.gpu.launch import misplaced, on
from offload.kernels.gpu.linear_int8 import _store
from offload.kernels.gpu.numbers import dot_whole

FEW_ROWS = 4
MAX_ROWS = 64  # beyond, unpacking once and torch's matrix product cost less
TILE_ROWS = 16  # of x that go through tensor cores at once
GROUPS = (32, 64, 128)
CHUNK = tl.constexpr(INT4_CHUNK)
LANES = tl.constexpr(16)  # words of a chunk
_OF_CHUNK = {32: torch.int64, 64: torch.int32, 128: torch.int16}  # a chunk's scales, side by side
# The bits of 1, given at run time: with a constant that the compiler does not know, "&" and "|" become one instruction.
_ONE = 0x3F800000


@dataclass(frozen=True)
class Tiles:
    """How a matrix is divided: programs take `outputs` of it and `steps` times `chunks` of 128 inputs."""

    outputs: int
    chunks: int
    parts: int
    steps: int


def tiles(outputs: int, inputs: int, rows: int) -> Tiles:
    """The division of a matrix; `rows` matters only as more than FEW_ROWS or not."""
    chunks = triton.cdiv(inputs, INT4_CHUNK)
    if rows > FEW_ROWS:
        return Tiles(64, 1, *parts.split(triton.cdiv(outputs, 64), chunks))
    block = parts.block_for(outputs, (32, 16, 8))
    return Tiles(block, 4, *parts.split(triton.cdiv(outputs, block), triton.cdiv(chunks, 4)))


@triton.jit
def _pair(w, one, pair: tl.constexpr):
    """1 + q / 16 of parts 2 * pair and 2 * pair + 1 of the words, which lie in their lower and upper halves; `one` is
    the bits of 1."""
    lower = w << (19 - 4 * pair)
    upper = w << 3 if pair == 0 else w >> (4 * pair - 3)
    low = ((lower & 0x00780000) | one).to(tl.float32, bitcast=True)
    high = ((upper & 0x00780000) | one).to(tl.float32, bitcast=True)
    return low, high


@triton.jit
def _of_group(chunk, group: tl.constexpr):
    """One of the float16 numbers that lie side by side in an integer, as float32 for all words of the chunk."""
    return (chunk >> (16 * group)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)[:, :, None]


@triton.jit
def _row(sums, low, high, s, o, x, row, rows, k, inputs):
    """Adds a row's products with one pair of parts: [outputs, chunks, lanes], a sixteenth of their value."""
    stop = tl.where(row < rows, inputs, 0)
    x_low = tl.load(x + row * inputs + k, mask=k < stop, other=0.0).to(tl.float32)[None, :, :]
    x_high = tl.load(x + row * inputs + k + LANES, mask=k + LANES < stop, other=0.0).to(tl.float32)[None, :, :]
    if o is None:
        inner = high * x_high + (low * x_low - 1.5 * (x_low + x_high))  # q - 8
        sums += inner * s
    else:
        inner = high * x_high + (low * x_low - (x_low + x_high))
        sums += inner * s + (x_low + x_high) * o
    return sums


@triton.jit(do_not_specialize=["rows", "chunks", "steps", "one"])
def _few(
    x, words, scale, offset, bias, y, rows, outputs, inputs, chunks, steps, one,
    ROWS: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    lane = tl.arange(0, LANES)
    first = part * steps * BLOCK_C
    last = tl.minimum(chunks, first + steps * BLOCK_C)
    row_words = words + n[:, None, None] * (chunks * LANES) + lane[None, None, :]
    # A sum for each word that a thread holds, and one row of x after the other: how many there are changes no order.
    sum0 = tl.zeros([BLOCK_N, BLOCK_C, LANES], tl.float32)
    sum1 = tl.zeros([BLOCK_N, BLOCK_C, LANES], tl.float32)
    sum2 = tl.zeros([BLOCK_N, BLOCK_C, LANES], tl.float32)
    sum3 = tl.zeros([BLOCK_N, BLOCK_C, LANES], tl.float32)
    c = first + tl.arange(0, BLOCK_C)
    inside = (n < outputs)[:, None] & (c < last)[None, :]
    ahead = tl.load(row_words + c[None, :, None] * LANES, mask=inside[:, :, None], other=0)
    for _ in range(steps):
        w, here = ahead, inside
        of_chunk = n[:, None] * chunks + c[None, :]
        scales = tl.load(scale + of_chunk, mask=here, other=0)
        offsets = None if offset is None else tl.load(offset + of_chunk, mask=here, other=0)
        k = c[:, None] * CHUNK + lane[None, :]
        c += BLOCK_C
        inside = (n < outputs)[:, None] & (c < last)[None, :]
        ahead = tl.load(row_words + c[None, :, None] * LANES, mask=inside[:, :, None], other=0)  # for the next turn
        for pair in tl.static_range(4):
            s = _of_group(scales, pair * 32 // GROUP)
            o = None if offset is None else _of_group(offsets, pair * 32 // GROUP) * 0.0625
            low, high = _pair(w, one, pair)
            at = k + pair * 2 * LANES
            sum0 = _row(sum0, low, high, s, o, x, 0, rows, at, inputs)
            if ROWS > 1:
                sum1 = _row(sum1, low, high, s, o, x, 1, rows, at, inputs)
            if ROWS > 2:
                sum2 = _row(sum2, low, high, s, o, x, 2, rows, at, inputs)
                sum3 = _row(sum3, low, high, s, o, x, 3, rows, at, inputs)
    _store(y, part, bias, _total(sum0), 0, n, rows, outputs)
    if ROWS > 1:
        _store(y, part, bias, _total(sum1), 1, n, rows, outputs)
    if ROWS > 2:
        _store(y, part, bias, _total(sum2), 2, n, rows, outputs)
        _store(y, part, bias, _total(sum3), 3, n, rows, outputs)


@triton.jit
def _total(sums):
    return tl.sum(tl.sum(sums, 2), 1) * 16


@triton.jit(do_not_specialize=["rows", "chunks", "steps"])
def _many(
    x, words, scale, offset, bias, y, rows, outputs, inputs, chunks, steps,
    ROWS: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    groups: tl.constexpr = CHUNK // GROUP
    inside = n < outputs
    total = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for c in range(part * steps, tl.minimum(chunks, (part + 1) * steps)):
        at = words + n[:, None] * (chunks * LANES) + c * LANES + tl.arange(0, LANES)[None, :]
        w = tl.load(at, mask=inside[:, None], other=0)
        for g in tl.static_range(groups):
            p = g * (GROUP // LANES) + tl.arange(0, GROUP // LANES)
            shift = 4 * (p >> 1) + 16 * (p & 1)
            q = tl.reshape((w[:, None, :] >> shift[None, :, None]) & 15, [BLOCK_N, GROUP])  # in the inputs' order
            k = c * CHUNK + g * GROUP + tl.arange(0, GROUP)
            rows_x = x + row[:, None] * inputs + k[None, :]
            some = tl.load(rows_x, mask=(row < rows)[:, None] & (k < inputs)[None, :], other=0.0)
            group = (n * chunks + c) * groups + g
            s = tl.load(scale + group, mask=inside, other=0.0).to(tl.float32)[None, :]
            if offset is None:
                total += dot_whole(some, tl.trans(q - 8)) * s
            else:
                o = tl.load(offset + group, mask=inside, other=0.0).to(tl.float32)[None, :]
                total += dot_whole(some, tl.trans(q)) * s + tl.sum(some.to(tl.float32), 1)[:, None] * o
    _store(y, part, bias, total, row[:, None], n[None, :], rows, outputs)


def refuses(x: torch.Tensor, weight: Int4Weight, bias: torch.Tensor | None = None) -> str | None:
    """Why `linear_int4` would not take these; None when it does."""
    held = weight.packed, weight.scale, *([] if weight.offset is None else [weight.offset])
    if (why := misplaced(x, bias, *held)) is not None:
        return why
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"activations in {x.dtype}"
    if weight.group not in GROUPS:
        return f"groups of {weight.group}"
    if not all(part.is_contiguous() for part in held):
        return "not contiguous"
    if weight.packed.data_ptr() % 4 or any(part.data_ptr() % (2 * INT4_CHUNK // weight.group) for part in held[1:]):
        return "at an address where no words begin"
    if x.shape[-1] == 0 or not 0 < x.numel() // x.shape[-1] <= MAX_ROWS:
        return f"more than {MAX_ROWS} rows, or none"
    return None


def linear_int4(x: torch.Tensor, weight: Int4Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """See offload.kernels.reference.linear_int4; at most MAX_ROWS rows of x."""
    outputs = len(weight.packed)
    words = weight.packed.view(torch.int32)
    chunks = words.shape[1] // LANES.value
    flat = x.reshape(-1, weight.inputs).contiguous()
    rows = len(flat)
    t = tiles(outputs, weight.inputs, rows)
    y = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    sums = parts.place_for(y, t.parts)
    blocks = triton.cdiv(outputs, t.outputs)
    given = sums, rows, outputs, weight.inputs, chunks, t.steps
    first_bias = bias if t.parts == 1 else None
    with on(x):
        if rows <= FEW_ROWS:
            word = _OF_CHUNK[weight.group]
            offset = None if weight.offset is None else weight.offset.view(word)
            _few[(blocks, t.parts)](
                flat, words, weight.scale.view(word), offset, first_bias, *given, _ONE,
                ROWS=triton.next_power_of_2(rows), GROUP=weight.group, BLOCK_N=t.outputs, BLOCK_C=t.chunks,
            )  # fmt: skip
        else:
            _many[(blocks, t.parts, triton.cdiv(rows, TILE_ROWS))](
                flat, words, weight.scale, weight.offset, first_bias, *given,
                ROWS=TILE_ROWS, GROUP=weight.group, BLOCK_N=t.outputs,
            )  # fmt: skip
        parts.add(sums, bias, y)
    return y.view(*x.shape[:-1], outputs)
