"""A packed matrix back to bf16, for products of many rows and for ops that want the matrix itself."""

from __future__ import annotations

import torch

from offload.kernels.cpu.lossless import unpack_row
from offload.kernels.cpu.memory import claim, get_i32, get_i64
from offload.kernels.cpu.team import team_function
from offload.kernels.formats.lossless import LosslessWeight

_PIECE_NBYTES = 128 << 10


@team_function("unpack_lossless")
def _unpack(block: int) -> None:
    pieces, step, outputs = get_i64(block, 1), get_i64(block, 2), get_i64(block, 3)
    low, codes, largest, starts = get_i64(block, 4), get_i64(block, 5), get_i64(block, 6), get_i64(block, 7)
    at, exponents, out = get_i64(block, 8), get_i64(block, 9), get_i64(block, 10)
    inputs, padded, patches = get_i64(block, 11), get_i64(block, 12), get_i64(block, 13)
    piece = claim(block)
    while piece < pieces:
        for n in range(piece * step, min(outputs, (piece + 1) * step)):
            first, last = get_i32(starts, n), get_i32(starts, n + 1)
            row, target = n * padded, out + n * inputs * 2
            unpack_row(low + row, codes + row // 2, largest, at, exponents, patches, first, last, target, inputs)
        piece = claim(block)


def refuses(weight: LosslessWeight, out: torch.Tensor | None = None) -> str | None:
    """Why `unpack_lossless` would not take these; None when it does."""
    return None if out is None or out.is_contiguous() else "not contiguous"


def unpack_lossless(weight: LosslessWeight, out: torch.Tensor | None = None) -> torch.Tensor:
    """See offload.kernels.reference.unpack_lossless.

    Args:
        out: bfloat16 [outputs, inputs], contiguous, to write to; default: a new tensor.
    """
    outputs, padded = weight.low.shape
    if out is None:
        out = torch.empty(outputs, weight.inputs, dtype=torch.bfloat16)
    step = max(1, _PIECE_NBYTES // (2 * padded))
    _unpack(
        -(-outputs // step), step, outputs, weight.low.data_ptr(), weight.codes.data_ptr(), weight.largest,
        weight.patch_start.data_ptr(), weight.patch_input.data_ptr(), weight.patch_exponent.data_ptr(), out.data_ptr(),
        weight.inputs, padded, len(weight.patch_input),
    )  # fmt: skip
    return out
