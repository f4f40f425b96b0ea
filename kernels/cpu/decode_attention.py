"""Attention of one or a few new tokens over a cache of keys and values where it lies: each byte of it is read once.

Work is cut into chunks of CHUNK tokens of one sequence and one key head, counted from the sequence's first valid token.
So there is work for every thread with a single sequence, the cuts never depend on the number of threads nor on the
neighbours, and a sequence gives the same bits with padding on its left and without. Parts are added in order of tokens.
"""

from __future__ import annotations

import math
import struct
from typing import Any

import torch
from numba import float32, int64

from offload.kernels.cpu.attention_block import BLOCK, STATE, load2_bf16, load2_f32, make_block
from offload.kernels.cpu.exp import exp2
from offload.kernels.cpu.helper import helper
from offload.kernels.cpu.lanes import evens, first, odds, total_of_4, zip_high, zip_low
from offload.kernels.cpu.memory import (
    claim,
    get_f32,
    get_i64,
    load_bf16,
    load_f32,
    load_u32,
    put_f32,
    put_i32,
    store_bf16,
    store_f32,
)
from offload.kernels.cpu.team import TeamFunction, team_function
from offload.kernels.cpu.vector import fma, splat_f32

CHUNK = 512  # tokens; whole blocks
ALONE = 1 << 19  # bytes of keys, for each new token, up to which one thread is done before it has met the others
_INFINITY = float("inf")
_LN_2 = math.log(2)


@helper
def _read(q: int, i: int, is_bf16: bool) -> Any:
    return load_bf16(q, i) if is_bf16 else load_f32(q, i)


@helper
def _write(out: int, i: int, value: Any, is_bf16: bool) -> None:
    if is_bf16:
        store_bf16(out, i, value)
    else:
        store_f32(out, i, value)


def _make(name: str, load: Any, load2: Any, itemsize: int, in_pairs: bool) -> TeamFunction:
    scores, values = make_block(load, load2, itemsize)

    @helper
    def place(q: int, is_bf16: bool, narrow: bool, dim: int, to: int) -> None:
        """A query as it is (`narrow`), or in float32 in the order in which keys are read."""
        paired = dim // 64 * 64
        if narrow:
            for i in range(0, dim, 16):
                store_bf16(to, i, load_bf16(q, i))
            return
        for i in range(0, paired, 32):
            a, b = _read(q, i, is_bf16), _read(q, i + 16, is_bf16)
            store_f32(to, i, evens(a, b) if in_pairs else a)
            store_f32(to, i + 16, odds(a, b) if in_pairs else b)
        for i in range(paired, dim, 16):
            store_f32(to, i, _read(q, i, is_bf16))

    @helper
    def prepare(
        q: int, begin: int, end: int, narrow: bool, is_bf16: bool, dim: int, r: int, state: int, to: int
    ) -> None:
        """Row `r` of four before its first block; it sees tokens `begin` to `end`. Without a query (0), it is zeros."""
        if q:
            place(q, is_bf16, narrow, dim, to)
        else:
            for i in range(0, dim, 16):
                store_f32(to, i, splat_f32(float32(0)))
        for lane in range(4 * r, 4 * r + 4):
            put_f32(state, lane, float32(-_INFINITY))
            put_f32(state, 16 + lane, float32(0))
            put_i32(state, STATE + lane, begin)
            put_i32(state, STATE + 16 + lane, max(int64(0), end - begin))

    @helper
    def last_seen(four: int, rows: int, queries: int, stop: int) -> int:
        """Where the tokens end that any of four rows sees: behind them, work would be for nothing."""
        first_row, last_row = 4 * four, min(4 * four + 3, rows - 1)
        if first_row // queries != last_row // queries:
            return stop  # one head's last query is among them
        return stop - queries + 1 + last_row % queries

    @team_function(f"decode_attention_{name}")
    def attend(block: int) -> None:
        runs, parts_in_run, count = get_i64(block, 1), get_i64(block, 2), get_i64(block, 3)
        chunks, kv_heads, tokens = get_i64(block, 4), get_i64(block, 5), get_i64(block, 6)
        q, q_batch, q_head, q_row = get_i64(block, 7), get_i64(block, 8), get_i64(block, 9), get_i64(block, 10)
        k, k_batch, k_head, k_token = get_i64(block, 11), get_i64(block, 12), get_i64(block, 13), get_i64(block, 14)
        v, v_batch, v_head, v_token = get_i64(block, 15), get_i64(block, 16), get_i64(block, 17), get_i64(block, 18)
        firsts, lengths, window = get_i64(block, 19), get_i64(block, 20), get_i64(block, 21)
        group, queries, dim = get_i64(block, 22), get_i64(block, 23), get_i64(block, 24)
        scale, cap = get_f32(block + 25 * 8, 0), get_f32(block + 25 * 8, 1)
        is_bf16, results, part_sums = get_i64(block, 26) != 0, get_i64(block, 27), get_i64(block, 28)
        scratch = get_i64(block, 31) + claim(block + 29 * 8) * get_i64(block, 30)  # this thread's
        rows, narrow = group * queries, is_bf16 and itemsize == 2
        fours = (rows + 3) // 4
        state_size, of_queries = int64(4 * (STATE + 32)), scratch + fours * 4 * (STATE + 32)
        run = claim(block)
        while run < runs:
            for part in range(run * parts_in_run, min(count, (run + 1) * parts_in_run)):
                sequence, head, chunk = part // chunks // kv_heads, part // chunks % kv_heads, part % chunks
                start = get_i64(firsts, sequence) if firsts else int64(0)
                stop = get_i64(lengths, sequence) if lengths else tokens
                # the first query sees tokens from `least` on, the last one from `latest`
                least = max(start, stop - queries + 1 - window) if window else start
                latest = max(start, stop - window) if window else start
                low = start + chunk * CHUNK
                high = min(low + CHUNK, stop)
                sums, result = part_sums + part * fours * 16 * dim, results + part * fours * 4 * 8
                sees = max(low, least) < high
                for r in range(4 * fours):
                    at = begin = end = int64(0)
                    if r < rows:
                        at = q + sequence * q_batch + (head * group + r // queries) * q_head + r % queries * q_row
                        end = stop - queries + 1 + r % queries
                        begin = max(start, end - window) if window else start
                    state, to = scratch + r // 4 * state_size, of_queries + 4 * r * dim
                    prepare(at, begin, end, narrow, is_bf16, dim, r % 4, state, to)
                    if sees:
                        for i in range(0, dim, 16):
                            store_f32(sums, r * dim + i, splat_f32(float32(0)))
                for token in range(low, high, BLOCK):
                    begin, end = max(token, least) - token, min(int64(BLOCK), high - token)
                    if begin >= end:
                        continue
                    masks = token < latest or token + BLOCK > stop - queries + 1 or end < BLOCK
                    keys = k + sequence * k_batch + head * k_head + token * k_token
                    vs = v + sequence * v_batch + head * v_head + token * v_token
                    after = keys + BLOCK * k_token
                    for four in range(fours):
                        state, of_four = scratch + four * state_size, of_queries + four * 16 * dim
                        seen = min(end, last_seen(four, rows, queries, stop) - token) if queries > 1 else end
                        if begin >= seen:
                            continue
                        scores(
                            state, of_four, keys, k_token, begin, seen, dim, scale, cap, masks, token,
                            load_u32(state, STATE), load_u32(state, STATE + 16), vs, v_token, narrow,
                        )  # fmt: skip
                        values(state, vs, v_token, begin, seen, dim, sums + four * 16 * dim, after, k_token)
                for four in range(fours):
                    state = scratch + four * state_size
                    store_f32(state, 16, total_of_4(load_f32(state, 16)))
                    for r in range(4):
                        put_f32(result, 8 * four + 2 * r, get_f32(state, 4 * r))
                        put_f32(result, 8 * four + 2 * r + 1, get_f32(state, 16 + 4 * r))
            run = claim(block)

    return attend


@team_function("decode_attention_merge")
def _merge(block: int) -> None:
    pieces, chunks, rows, dim = get_i64(block, 1), get_i64(block, 2), get_i64(block, 3), get_i64(block, 4)
    parts, part_sums, out, lse = get_i64(block, 5), get_i64(block, 6), get_i64(block, 7), get_i64(block, 8)
    is_bf16, in_pairs = get_i64(block, 9) != 0, get_i64(block, 10) != 0
    sums = get_i64(block, 12) + claim(block + 11 * 8) * 4 * dim  # this thread's
    padded, zero = (rows + 3) // 4 * 4, splat_f32(float32(0))
    piece = claim(block)
    while piece < pieces:
        at = piece // rows * chunks * padded + piece % rows  # the first chunk's
        most, total = float32(-_INFINITY), float32(0)
        for chunk in range(chunks):
            if get_f32(parts, 2 * (at + chunk * padded) + 1) != 0:
                most = max(most, get_f32(parts, 2 * (at + chunk * padded)))
        for i in range(0, dim, 16):
            store_f32(sums, i, zero)
        for chunk in range(chunks):
            row = at + chunk * padded
            of_part = get_f32(parts, 2 * row + 1)
            if of_part != 0:
                by = exp2(splat_f32(get_f32(parts, 2 * row) - most))
                total += first(by) * of_part
                for i in range(0, dim, 16):
                    store_f32(sums, i, fma(load_f32(part_sums, row * dim + i), by, load_f32(sums, i)))
        whole = splat_f32(total) if total != 0 else splat_f32(float32(1))
        paired, to = dim // 64 * 64, piece * dim
        for i in range(0, paired, 32):
            a, b = load_f32(sums, i) / whole, load_f32(sums, i + 16) / whole
            _write(out, to + i, zip_low(a, b) if in_pairs else a, is_bf16)
            _write(out, to + i + 16, zip_high(a, b) if in_pairs else b, is_bf16)
        for i in range(paired, dim, 16):
            _write(out, to + i, load_f32(sums, i) / whole, is_bf16)
        value = most * _LN_2 + math.log(total) if total != 0 else -_INFINITY
        put_f32(lse, piece, float32(value))
        piece = claim(block)


_FUNCTIONS = {
    torch.bfloat16: _make("bf16", load_bf16, load2_bf16, 2, True),
    torch.float32: _make("f32", load_f32, load2_f32, 4, False),
}


def refuses(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    first: torch.Tensor | None = None,
    length: torch.Tensor | None = None,
    most: int | None = None,
) -> str | None:
    """Why `decode_attention` would not take these; None when it does."""
    if q.device.type != "cpu":
        return f"on {q.device}"
    if k.dtype not in _FUNCTIONS or v.dtype != k.dtype or q.dtype not in _FUNCTIONS:
        return f"{q.dtype} with {k.dtype} and {v.dtype}"
    if q.dim() not in (3, 4) or k.dim() != 4 or k.shape != v.shape or q.shape[1] % k.shape[1]:
        return f"shapes {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
    if q.shape[-1] % 16 or q.shape[-1] != k.shape[3]:
        return f"a head dimension of {q.shape[-1]}, not a multiple of 16"
    if any(t.stride(-1) != 1 for t in (q, k, v)):
        return "head dimensions that do not lie in one piece"
    return None


def decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    first: torch.Tensor | None = None,
    length: torch.Tensor | None = None,
    most: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See offload.kernels.reference.decode_attention; bfloat16 or float32, any strides but the last.

    Raises:
        ValueError: `first` or `length` is not within the cache.
    """
    batch, kv_heads, tokens, dim = k.shape
    spans = [None if ends is None else ends.to(torch.int64).contiguous() for ends in (first, length)]
    for ends, what in zip(spans, ("first", "length"), strict=True):
        if ends is not None and (ends.shape != (batch,) or not 0 <= int(ends.min()) <= int(ends.max()) <= tokens):
            raise ValueError(f"{what} {ends.tolist()} for {batch} sequences of {tokens} tokens")
    spanned = tokens if most is None else min(tokens, most)
    if spanned < tokens:
        valid = (tokens if spans[1] is None else spans[1]) - (0 if spans[0] is None else spans[0])
        if int(torch.as_tensor(valid).max()) > spanned:
            raise ValueError(f"a sequence has more than the {most} tokens that were said to be most")
    q4 = q if q.dim() == 4 else q.unsqueeze(2)
    group, queries = q.shape[1] // kv_heads, q4.shape[2]
    rows, fours, chunks = group * queries, -(-group * queries // 4), -(-spanned // CHUNK)
    out, lse = torch.empty(q.shape, dtype=q.dtype), torch.empty(q.shape[:-1])
    pieces, threads = batch * kv_heads * chunks, torch.get_num_threads()
    run = max(1, min(8, pieces // (8 * threads)))  # what one thread does in a row: memory is read ahead through it
    size = -(-fours * (STATE + 32 + 4 * dim) // 32) * 32  # floats of scratch for each thread, whole cache lines
    work = torch.empty(pieces * fours * 4 * (dim + 2) + threads * size + 32)
    sums = work.data_ptr()
    parts = sums + pieces * fours * 4 * dim * 4
    scratch = -(-(parts + pieces * fours * 4 * 2 * 4) // 128) * 128
    (numbers,) = struct.unpack("<q", struct.pack("<ff", scale, softcap or 0.0))
    is_bf16 = q.dtype == torch.bfloat16
    _FUNCTIONS[k.dtype](
        -(-pieces // run), run, pieces, chunks, kv_heads, tokens,
        q.data_ptr(), *(stride * q.itemsize for stride in q4.stride()[:3]),
        k.data_ptr(), *(stride * k.itemsize for stride in k.stride()[:3]),
        v.data_ptr(), *(stride * v.itemsize for stride in v.stride()[:3]),
        *(0 if ends is None else ends.data_ptr() for ends in spans), window or 0, group, queries, dim, numbers,
        is_bf16, parts, sums, 0, 4 * size, scratch,
        threads=None if batch * kv_heads * spanned * dim * k.itemsize * queries > ALONE else 1,
    )  # fmt: skip
    _merge(
        batch * kv_heads * rows, chunks, rows, dim, parts, sums, out.data_ptr(), lse.data_ptr(), is_bf16,
        k.dtype == torch.bfloat16, 0, scratch, threads=None if pieces * rows * dim > 1 << 16 else 1,
    )  # fmt: skip
    return out, lse
