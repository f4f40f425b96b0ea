"""A checksum of bytes in one pass of all threads over them."""

from __future__ import annotations

import torch
from numba import int64, uint32

from offload.kernels.cpu.memory import claim, get_i64, load_u32, store_u32
from offload.kernels.cpu.team import team_function
from offload.kernels.cpu.vector import splat_u32
from offload.kernels.reference.checksum import LINE_NBYTES, PIECE_NBYTES, digest


@team_function("checksum")
def _checksum(block: int) -> None:
    pieces, lines, data, sums = get_i64(block, 1), get_i64(block, 2), get_i64(block, 3), get_i64(block, 4)
    each = PIECE_NBYTES // LINE_NBYTES
    piece = claim(block)
    while piece < pieces:
        first = second = splat_u32(uint32(0))
        for line in range(piece * each, min(lines, (piece + 1) * each)):
            first = first + load_u32(data, line * int64(16))
            second = second + first
        store_u32(sums, piece * int64(32), first)
        store_u32(sums, piece * int64(32) + 16, second)
        piece = claim(block)


def refuses(data: torch.Tensor) -> str | None:
    """Why `checksum` would not take this; None when it does."""
    return None if data.is_contiguous() else "not contiguous"


def checksum(data: torch.Tensor) -> str:
    """See offload.kernels.reference.checksum."""
    pieces = -(-data.numel() // PIECE_NBYTES)
    sums = torch.empty(pieces * 32, dtype=torch.int32)
    if pieces:
        _checksum(pieces, data.numel() // LINE_NBYTES, data.data_ptr(), sums.data_ptr())
    return digest(sums, data.numel())
