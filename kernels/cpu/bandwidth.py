"""How fast this machine reads and copies memory: the bound of every kernel here, measured the way they work."""

from __future__ import annotations

from typing import Any

import torch
from numba import float32, int64

from offload.kernels.cpu.lanes import total
from offload.kernels.cpu.memory import claim, get_i64, load_f32, put_f32, store_f32
from offload.kernels.cpu.team import team_function
from offload.kernels.cpu.vector import splat_f32

PIECE = 1 << 20  # bytes that a thread claims, as long as those of the kernels


@team_function("read")
def _read(block: int) -> None:
    pieces, source, sink = get_i64(block, 1), get_i64(block, 2), get_i64(block, 3)
    piece = claim(block)
    while piece < pieces:
        a = b = c = d = splat_f32(float32(0))
        start = source + piece * int64(PIECE)
        for k in range(0, PIECE // 4, 64):
            a = a + load_f32(start, k)
            b = b + load_f32(start, k + 16)
            c = c + load_f32(start, k + 32)
            d = d + load_f32(start, k + 48)
        put_f32(sink, piece, total((a + b) + (c + d)))
        piece = claim(block)


@team_function("copy")
def _copy(block: int) -> None:
    pieces, source, target = get_i64(block, 1), get_i64(block, 2), get_i64(block, 3)
    piece = claim(block)
    while piece < pieces:
        at = piece * int64(PIECE)
        for k in range(0, PIECE // 4, 16):
            store_f32(target + at, k, load_f32(source + at, k))
        piece = claim(block)


def read(area: torch.Tensor, threads: int | None = None) -> Any:
    """Reads all of `area` (uint8, contiguous, whole pieces of 1 MiB)."""
    sink = torch.empty(area.numel() // PIECE)
    _read(len(sink), area.data_ptr(), sink.data_ptr(), threads=threads)
    return sink


def copy(target: torch.Tensor, source: torch.Tensor, threads: int | None = None) -> None:
    """Copies `source` to `target` (uint8, contiguous, whole pieces of 1 MiB)."""
    _copy(source.numel() // PIECE, source.data_ptr(), target.data_ptr(), threads=threads)
