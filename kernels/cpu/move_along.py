"""Weights moved along random directions in one pass: each is read once, however many moves are due, and directions are
made in registers, of 32 bits a pair of elements.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import torch
from numba import uint32

from offload.kernels.cpu.convert import through_bf16
from offload.kernels.cpu.helper import helper
from offload.kernels.cpu.lanes import lane_numbers, where_less
from offload.kernels.cpu.memory import (
    claim,
    get_f32,
    get_i32,
    get_i64,
    load_bf16,
    load_f32,
    prefetch,
    store_bf16,
    store_f32,
    stream_bf16,
)
from offload.kernels.cpu.normal import normals, philox
from offload.kernels.cpu.team import TeamFunction, team_function
from offload.kernels.cpu.vector import fma, magnitude, splat_f32, splat_u32
from offload.kernels.reference.directions import BLOCK, Along, Sides

PIECE = 256  # blocks that a thread claims
AHEAD = 8 * BLOCK  # elements between those that are fetched and those that are moved


@helper(inline=True)
def _bits(block: int, step: int, words: int) -> Any:
    """Random bits of a block of elements: four vectors."""
    first = splat_u32(uint32(block * 16)) + lane_numbers()
    k0, k1, c2, c3 = get_i64(words, 0), get_i64(words, 1), get_i64(words, 2), get_i64(words, 3)
    return philox(first, splat_u32(uint32(step)), splat_u32(uint32(c2)), splat_u32(uint32(c3)), k0, k1)


@helper(inline=True)
def _as_it_is(value: Any) -> Any:
    return value


@helper(inline=True)
def _store_two_f32(address: int, k: int, low: Any, high: Any) -> None:
    store_f32(address, k, low)
    store_f32(address, k + 16, high)


@helper(inline=True)
def _store_two_bf16(address: int, k: int, low: Any, high: Any) -> None:
    store_bf16(address, k, low)
    store_bf16(address, k + 16, high)


def _make(name: str, load: Any, rounded: Any, store_two: Any, stream_two: Any, nbytes: int) -> TeamFunction:
    @helper(inline=True)
    def move(w: Any, z: Any, by: Any, limit: Any) -> Any:
        return where_less(limit, magnitude(w), w, rounded(fma(by, z, w)))

    @helper(inline=True)
    def to_sides(plus: int, minus: int, k: int, w: Any, v: Any, word: Any, eps: Any, back: Any, limit: Any) -> None:
        """32 weights, in two vectors, to both sides."""
        y, z = normals(word)
        far, near = move(w, y, eps, limit), move(v, z, eps, limit)
        if plus % 64 == 0:
            stream_two(plus, k, far, near)
        else:
            store_two(plus, k, far, near)
        far, near = move(w, y, back, limit), move(v, z, back, limit)
        if minus % 64 == 0:
            stream_two(minus, k, far, near)
        else:
            store_two(minus, k, far, near)

    @team_function(name)
    def move_along(block: int) -> None:
        pieces, count, start = get_i64(block, 1), get_i64(block, 2), get_i64(block, 3)
        source, kept, plus, minus = get_i64(block, 4), get_i64(block, 5), get_i64(block, 6), get_i64(block, 7)
        words, moves, due, side_step = get_i64(block, 8), get_i64(block, 9), get_i64(block, 10), get_i64(block, 11)
        numbers = get_i64(block, 12)
        limit, eps, back = (
            splat_f32(get_f32(numbers, 0)),
            splat_f32(get_f32(numbers, 1)),
            splat_f32(get_f32(numbers, 2)),
        )
        piece = claim(block)
        while piece < pieces:
            for b in range(piece * PIECE, min(count, (piece + 1) * PIECE)):
                k = b * BLOCK
                for line in range(0, BLOCK * nbytes, 64):
                    prefetch(source + (k + AHEAD) * nbytes + line)
                a0, a1 = load(source, k), load(source, k + 16)
                a2, a3 = load(source, k + 32), load(source, k + 48)
                a4, a5 = load(source, k + 64), load(source, k + 80)
                a6, a7 = load(source, k + 96), load(source, k + 112)
                for m in range(due):
                    r0, r1, r2, r3 = _bits(start + b, get_i32(moves, 2 * m), words)
                    by = splat_f32(get_f32(moves, 2 * m + 1))
                    y, z = normals(r0)
                    a0, a1 = move(a0, y, by, limit), move(a1, z, by, limit)
                    y, z = normals(r1)
                    a2, a3 = move(a2, y, by, limit), move(a3, z, by, limit)
                    y, z = normals(r2)
                    a4, a5 = move(a4, y, by, limit), move(a5, z, by, limit)
                    y, z = normals(r3)
                    a6, a7 = move(a6, y, by, limit), move(a7, z, by, limit)
                if kept != 0:
                    store_two(kept, k, a0, a1)
                    store_two(kept, k + 32, a2, a3)
                    store_two(kept, k + 64, a4, a5)
                    store_two(kept, k + 96, a6, a7)
                if plus != 0:
                    r0, r1, r2, r3 = _bits(start + b, side_step, words)
                    to_sides(plus, minus, k, a0, a1, r0, eps, back, limit)
                    to_sides(plus, minus, k + 32, a2, a3, r1, eps, back, limit)
                    to_sides(plus, minus, k + 64, a4, a5, r2, eps, back, limit)
                    to_sides(plus, minus, k + 96, a6, a7, r3, eps, back, limit)
            piece = claim(block)  # also orders the streamed stores before whatever this thread does next

    return move_along


_FUNCTIONS = {
    torch.bfloat16: _make("move_along_bf16", load_bf16, through_bf16, _store_two_bf16, stream_bf16, 2),
    torch.float32: _make("move_along_f32", load_f32, _as_it_is, _store_two_f32, _store_two_f32, 4),
}


def refuses(
    weights: torch.Tensor,
    along: Along,
    moves: Sequence[tuple[int, float]],
    kept: torch.Tensor | None,
    sides: Sides | None = None,
) -> str | None:
    """Why `move_along` would not take these; None when it does."""
    if weights.dtype not in _FUNCTIONS:
        return f"weights in {weights.dtype}"
    given = [weights, kept, *((sides.plus, sides.minus) if sides is not None else ())]
    return None if all(t is None or t.is_contiguous() for t in given) else "not contiguous"


def move_along(
    weights: torch.Tensor,
    along: Along,
    moves: Sequence[tuple[int, float]],
    kept: torch.Tensor | None,
    sides: Sides | None = None,
) -> None:
    """See offload.kernels.reference.move_along."""
    places = [weights.detach(), kept, None if sides is None else sides.plus, None if sides is None else sides.minus]
    flat = [None if t is None else t.detach().reshape(-1) for t in places]
    blocks, rest = divmod(weights.numel(), BLOCK)
    step, eps = (0, 0.0) if sides is None else (sides.step, sides.eps)
    words = torch.tensor(along.words, dtype=torch.int64)
    table = torch.frombuffer(bytearray(b"".join(struct.pack("<if", *m) for m in moves) or b"0000"), dtype=torch.uint8)
    numbers = torch.tensor([along.limit, eps, -eps], dtype=torch.float32)

    def run(tensors: Sequence[torch.Tensor | None], count: int, start: int) -> None:
        addresses = [0 if t is None else t.data_ptr() for t in tensors]
        _FUNCTIONS[weights.dtype](
            -(-count // PIECE), count, start, *addresses, words.data_ptr(), table.data_ptr(), len(moves), step,
            numbers.data_ptr(),
        )  # fmt: skip

    if blocks:
        run(flat, blocks, 0)
    if rest:  # the last elements, as the beginning of a block
        tails = [None if t is None else torch.zeros(BLOCK, dtype=t.dtype) for t in flat]
        assert tails[0] is not None
        assert flat[0] is not None
        tails[0][:rest] = flat[0][-rest:]
        run(tails, 1, blocks)
        for t, tail in zip(flat[1:], tails[1:], strict=True):
            if t is not None and tail is not None:
                t[-rest:] = tail[:rest]
