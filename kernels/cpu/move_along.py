"""Weights moved along random directions in one pass: each is read once, however many moves are due, and directions are
made in registers, of 32 bits a pair of elements.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from math import inf
from typing import Any

import torch
from numba import uint32

from offload.kernels.cpu.helper import helper
from offload.kernels.cpu.memory import (
    claim,
    get_f32,
    get_i32,
    get_i64,
    load_wide_bf16,
    load_wide_f32,
    prefetch,
    scratch,
    store_wide_f32,
    store_wide_u16,
    stream_wide_f32,
    stream_wide_u16,
)
from offload.kernels.cpu.normal import normals, philox
from offload.kernels.cpu.team import TeamFunction, team_function
from offload.kernels.cpu.vector import wide_f32, wide_u32
from offload.kernels.cpu.wide import wide_fma, wide_lane_numbers, wide_to_bf16, wide_unless_larger
from offload.kernels.reference.directions import BLOCK, Along, Sides

MOST = 1024  # blocks that a thread claims: a megabyte, since streams that begin anew all the time are slow
AHEAD = 4 * BLOCK  # elements between those that are fetched and those that are moved
SPARE_NBYTES = 4 * BLOCK
PART = BLOCK // 4  # elements that one of Philox's four words is for


@helper(inline=True)
def _bits(block: int, step: int, words: int) -> Any:
    """Random bits of a block of elements: four vectors."""
    first = wide_u32(uint32(block * 64)) + wide_lane_numbers()
    k0, k1, c2, c3 = get_i64(words, 0), get_i64(words, 1), get_i64(words, 2), get_i64(words, 3)
    return philox(first, wide_u32(uint32(step)), wide_u32(uint32(c2)), wide_u32(uint32(c3)), k0, k1)


@helper(inline=True)
def _as_it_is(value: Any) -> Any:
    return value


@helper(inline=True)
def _all(w: Any, limit: Any, moved: Any) -> Any:
    return moved


@helper(inline=True)
def _small_ones(w: Any, limit: Any, moved: Any) -> Any:
    return wide_unless_larger(w, limit, moved, w)


def _make(name: str, load: Any, rounded: Any, store: Any, stream: Any, nbytes: int, chosen: Any) -> TeamFunction:
    @helper(inline=True)
    def moved(w: Any, z: Any, by: Any, limit: Any) -> Any:
        return rounded(chosen(w, limit, wide_fma(by, z, w)))

    @helper(inline=True)
    def move(source: int, kept: int, k: int, word: Any, by: Any, limit: Any) -> None:
        y, z = normals(word)
        store(kept, k, moved(load(source, k), y, by, limit))
        store(kept, k + 64, moved(load(source, k + 64), z, by, limit))

    @helper(inline=True)
    def to_sides(source: int, plus: int, minus: int, k: int, word: Any, eps: Any, back: Any, limit: Any) -> None:
        y, z = normals(word)
        w, v = load(source, k), load(source, k + 64)
        if (plus | minus) % 64 == 0:
            stream(plus, k, moved(w, y, eps, limit))
            stream(plus, k + 64, moved(v, z, eps, limit))
            stream(minus, k, moved(w, y, back, limit))
            stream(minus, k + 64, moved(v, z, back, limit))
        else:
            store(plus, k, moved(w, y, eps, limit))
            store(plus, k + 64, moved(v, z, eps, limit))
            store(minus, k, moved(w, y, back, limit))
            store(minus, k + 64, moved(v, z, back, limit))

    @team_function(name)
    def move_along(block: int) -> None:
        pieces, count, start = get_i64(block, 1), get_i64(block, 2), get_i64(block, 3)
        source, kept, plus, minus = get_i64(block, 4), get_i64(block, 5), get_i64(block, 6), get_i64(block, 7)
        words, moves, due, side_step = get_i64(block, 8), get_i64(block, 9), get_i64(block, 10), get_i64(block, 11)
        numbers, each, spare = get_i64(block, 12), get_i64(block, 13), scratch(SPARE_NBYTES)
        limit, eps, back = (
            wide_f32(get_f32(numbers, 0)), wide_f32(get_f32(numbers, 1)), wide_f32(get_f32(numbers, 2))
        )  # fmt: skip
        piece = claim(block)
        while piece < pieces:
            for b in range(piece * each, min(count, (piece + 1) * each)):
                k = b * BLOCK
                for line in range(0, BLOCK * nbytes, 64):
                    prefetch(source + (k + AHEAD) * nbytes + line)
                here = source + k * nbytes
                there = kept + k * nbytes if kept != 0 else spare  # a block lies in the first cache between moves
                for m in range(due):
                    r0, r1, r2, r3 = _bits(start + b, get_i32(moves, 2 * m), words)
                    by = wide_f32(get_f32(moves, 2 * m + 1))
                    move(here, there, 0, r0, by, limit)
                    move(here, there, PART, r1, by, limit)
                    move(here, there, 2 * PART, r2, by, limit)
                    move(here, there, 3 * PART, r3, by, limit)
                    here = there
                if plus != 0:
                    r0, r1, r2, r3 = _bits(start + b, side_step, words)
                    far, near = plus + k * nbytes, minus + k * nbytes
                    to_sides(here, far, near, 0, r0, eps, back, limit)
                    to_sides(here, far, near, PART, r1, eps, back, limit)
                    to_sides(here, far, near, 2 * PART, r2, eps, back, limit)
                    to_sides(here, far, near, 3 * PART, r3, eps, back, limit)
            piece = claim(block)  # also orders the streamed stores before whatever this thread does next

    return move_along


_KINDS = {
    torch.bfloat16: ("bf16", load_wide_bf16, wide_to_bf16, store_wide_u16, stream_wide_u16, 2),
    torch.float32: ("f32", load_wide_f32, _as_it_is, store_wide_f32, stream_wide_f32, 4),
}
_FUNCTIONS = {
    (dtype, is_sparse): _make(f"move_{'some' if is_sparse else 'all'}_{name}", *parts, chosen)
    for dtype, (name, *parts) in _KINDS.items()
    for is_sparse, chosen in ((False, _all), (True, _small_ones))
}


def refuses(
    weights: torch.Tensor,
    along: Along,
    moves: Sequence[tuple[int, float]],
    kept: torch.Tensor | None,
    sides: Sides | None = None,
) -> str | None:
    """Why `move_along` would not take these; None when it does."""
    if weights.dtype not in _KINDS:
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
        each = max(16, min(MOST, count // (4 * torch.get_num_threads())))
        _FUNCTIONS[weights.dtype, along.limit != inf](
            -(-count // each), count, start, *addresses, words.data_ptr(), table.data_ptr(), len(moves), step,
            numbers.data_ptr(), each,
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
