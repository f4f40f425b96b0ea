"""A packed matrix back to bf16 on the device, so that only three quarters of its bytes cross the link."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from offload.kernels.formats.lossless import LOSSLESS_BLOCK, LosslessWeight
from offload.kernels.gpu.launch import misplaced, on

_BLOCKS = 64  # of 64 weights, for one program
_PATCHES = 32  # that a program writes at a time: a row has a few


@triton.jit
def _half(low, code, largest, out, n, column, inputs, inside):
    """Half of each block: sign and mantissa are in `low`, the exponent is `code` below the largest."""
    low = low.to(tl.int32)
    bits = ((low & 0x80) << 8) | (((largest - code) & 0xFF) << 7) | (low & 0x7F)
    tl.store(out + n * inputs + column, bits.to(tl.int16), mask=inside & (column < inputs))


@triton.jit(do_not_specialize=["largest"])
def _unpack(low, codes, largest, out, outputs, inputs, row_blocks, BLOCKS: tl.constexpr, HALF: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    j = tl.arange(0, HALF)[None, :]
    inside = block < outputs * row_blocks
    code = tl.load(codes + block * HALF + j, mask=inside, other=0).to(tl.int32)
    first = tl.load(low + block * (2 * HALF) + j, mask=inside, other=0)
    second = tl.load(low + block * (2 * HALF) + HALF + j, mask=inside, other=0)
    n = block // row_blocks
    column = (block % row_blocks) * (2 * HALF) + j
    _half(first, code & 15, largest, out, n, column, inputs, inside)
    _half(second, code >> 4, largest, out, n, column + HALF, inputs, inside)


@triton.jit
def _patch(low, start, at, exponent, out, inputs, padded, PATCHES: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    last = tl.load(start + n + 1)
    for first in range(tl.load(start + n), last, PATCHES):
        k = first + tl.arange(0, PATCHES)
        inside = k < last
        column = tl.load(at + k, mask=inside, other=0)
        bits = tl.load(low + n * padded + column, mask=inside, other=0).to(tl.int32)
        value = tl.load(exponent + k, mask=inside, other=0).to(tl.int32)
        bits = ((bits & 0x80) << 8) | (value << 7) | (bits & 0x7F)
        tl.store(out + n * inputs + column, bits.to(tl.int16), mask=inside)


def refuses(weight: LosslessWeight, out: torch.Tensor | None = None) -> str | None:
    """Why `unpack_lossless` would not take these; None when it does."""
    parts = weight.low, weight.codes, weight.patch_start, weight.patch_input, weight.patch_exponent
    if (why := misplaced(*parts, out)) is not None:
        return why
    if not all(part.is_contiguous() for part in parts) or (out is not None and not out.is_contiguous()):
        return "not contiguous"
    return None


def unpack_lossless(weight: LosslessWeight, out: torch.Tensor | None = None) -> torch.Tensor:
    """See offload.kernels.reference.unpack_lossless.

    Args:
        out: bfloat16 [outputs, inputs], contiguous, to write to; default: a new tensor.
    """
    outputs, padded = weight.low.shape
    if out is None:
        out = torch.empty(outputs, weight.inputs, dtype=torch.bfloat16, device=weight.low.device)
    row_blocks = padded // LOSSLESS_BLOCK
    bits = out.view(torch.int16)
    with on(out):
        _unpack[(triton.cdiv(outputs * row_blocks, _BLOCKS),)](
            weight.low, weight.codes, weight.largest, bits, outputs, weight.inputs, row_blocks,
            BLOCKS=_BLOCKS, HALF=LOSSLESS_BLOCK // 2,
        )  # fmt: skip
        if len(weight.patch_input):  # after the rest, in the stream's order
            _patch[(outputs,)](
                weight.low, weight.patch_start, weight.patch_input, weight.patch_exponent, bits, weight.inputs, padded,
                PATCHES=_PATCHES,
            )  # fmt: skip
    return out
