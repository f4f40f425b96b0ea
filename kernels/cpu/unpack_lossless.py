"""A packed matrix back to bf16, for products of many rows and for ops that want the matrix itself."""

from __future__ import annotations

import torch
from numba import int64, uint32

from offload.kernels.cpu.helper import helper
from offload.kernels.cpu.lossless import block_at, clean_until, patched
from offload.kernels.cpu.memory import claim, get_i32, get_i64, get_u16, put_u16, scratch, store_u16, stream_u16
from offload.kernels.cpu.team import team_function
from offload.kernels.cpu.vector import splat_u16
from offload.kernels.formats.lossless import LosslessWeight

STREAM_NBYTES = 24 << 20  # what is larger goes past the caches, where it would not be found again
_PIECE_NBYTES = 128 << 10


@helper
def _unpack_row(  # type: ignore[no-untyped-def]
    low: int, codes: int, largest: int, at: int, exponents: int, patch: int, last: int, out: int, n: int, streams: bool
):  # fmt: skip
    """Writes `n` bf16 to the address `out`, past the caches if it `streams` (and is a multiple of 64)."""
    top, whole, k, rest = splat_u16(uint32(largest << 7)), n // 64 * 64, int64(0), scratch(128)
    while k < n:
        stop = clean_until(at, patch, last, k, whole)
        while k < stop:
            one, two = block_at(low, codes, top, k)
            if streams:
                stream_u16(out, k, one)
                stream_u16(out, k + 32, two)
            else:
                store_u16(out, k, one)
                store_u16(out, k + 32, two)
            k += 64
        if k < n:
            one, two = block_at(low, codes, top, k)
            one, two, patch = patched(one, two, at, exponents, patch, last, k)
            to = out + 2 * k if k < whole else rest
            store_u16(to, 0, one)
            store_u16(to, 32, two)
            if k == whole:
                for i in range(n - whole):
                    put_u16(out, whole + i, get_u16(rest, i))
            k += 64


@team_function("unpack_lossless")
def _unpack(block: int) -> None:
    pieces, step, outputs = get_i64(block, 1), get_i64(block, 2), get_i64(block, 3)
    low, codes, largest, starts = get_i64(block, 4), get_i64(block, 5), get_i64(block, 6), get_i64(block, 7)
    at, exponents, out = get_i64(block, 8), get_i64(block, 9), get_i64(block, 10)
    inputs, padded, patches = get_i64(block, 11), get_i64(block, 12), get_i64(block, 13)
    streams = get_i64(block, 14) != 0
    piece = claim(block)
    while piece < pieces:
        for n in range(piece * step, min(outputs, (piece + 1) * step)):
            first, last = max(get_i32(starts, n), int64(0)), min(get_i32(starts, n + 1), patches)
            row, target = n * padded, out + n * inputs * 2
            _unpack_row(low + row, codes + row // 2, largest, at, exponents, first, last, target, inputs, streams)
        piece = claim(block)  # also orders the streamed stores before whatever this thread does next


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
    streams = out.nbytes > STREAM_NBYTES and out.data_ptr() % 64 == 0 and weight.inputs % 32 == 0
    step = max(1, _PIECE_NBYTES // (2 * padded))
    _unpack(
        -(-outputs // step), step, outputs, weight.low.data_ptr(), weight.codes.data_ptr(), weight.largest,
        weight.patch_start.data_ptr(), weight.patch_input.data_ptr(), weight.patch_exponent.data_ptr(), out.data_ptr(),
        weight.inputs, padded, len(weight.patch_input), streams,
    )  # fmt: skip
    return out
