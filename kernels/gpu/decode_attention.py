"""Attention of a few new tokens over a cache where it lies: flash-decoding, split along the tokens and merged.

A program takes CHUNK tokens of one sequence and one key head, counted from the sequence's first valid token, with all
query heads that share the key head, sixteen rows for the tensor cores; a second kernel merges the chunks in order. The
cuts depend on neither the neighbours nor the padding, so a sequence gives the same bits in any company. (After
flash-decoding: Dao, Haziza, Massa and Sizov, 2023.)
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from offload.kernels.gpu.launch import misplaced, on
from offload.kernels.gpu.numbers import dot, rounded

CHUNK = 256  # tokens of a program
TILE_ROWS = 16  # of a key head's queries, that go through tensor cores at once
MAX_ROWS = 64  # beyond, it is no decoding: torch's attention costs less
MAX_HEAD_DIM = 256
_MERGED = 16  # chunks that are merged at a time
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LOG2_E = tl.constexpr(math.log2(math.e))
_LN_2 = tl.constexpr(math.log(2))


def blocks(head_dim: int) -> tuple[int, int]:
    """(tokens, numbers of a head) that a program holds at a time: at most 32 KiB of bf16 keys and values."""
    wide = max(16, triton.next_power_of_2(head_dim))
    return (64 if wide <= 128 else 32), wide


@triton.jit
def _tanh(x):
    """By exp, and near zero, where that would cancel, by the series."""
    e = tl.exp(-2 * tl.abs(x))
    far = (1 - e) / (1 + e)
    s = x * x
    near = x * (1 - s * (1 / 3 - s * (2 / 15 - s * (17 / 315 - s * (62 / 2835)))))
    return tl.where(s < 0.04, near, tl.where(x < 0, -far, far))


@triton.jit(do_not_specialize=["window", "tokens", "kv_heads", "rows", "queries", "chunks"])
def _attend(
    q, k, v, sums, tops, totals, first, length, scale, cap, window, tokens, kv_heads, rows, queries, dim, chunks,
    k_batch, k_head, k_token, v_batch, v_head, v_token,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64)  # a sequence and one of its key heads
    chunk = tl.program_id(1)
    r = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    b, h = pair // kv_heads, pair % kv_heads
    start = 0 if first is None else tl.load(first + b).to(tl.int32)
    stop = tokens if length is None else tl.load(length + b).to(tl.int32)
    # Row r is token r % queries of the last; it sees tokens from begin to end.
    end = stop - queries + 1 + r % queries
    begin = tl.where(window > 0, tl.maximum(start, end - window), start)
    low = start + chunk * CHUNK
    high = tl.minimum(low + CHUNK, stop)
    unseen = tl.where(window > 0, tl.maximum(stop - queries + 1 - window - low, 0), 0)  # by any row, of the chunk
    d = tl.arange(0, BLOCK_D)
    mine = (r < rows)[:, None] & (d < dim)[None, :]
    some = tl.load(q + (pair * rows + r)[:, None] * dim + d[None, :], mask=mine, other=0.0)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    k += b * k_batch + h * k_head
    v += b * v_batch + h * v_head
    for at in range(low + unseen // BLOCK_T * BLOCK_T, high, BLOCK_T):
        t = at + tl.arange(0, BLOCK_T)
        held = (t < high)[:, None] & (d < dim)[None, :]
        key = tl.load(k + t.to(tl.int64)[:, None] * k_token + d[None, :], mask=held, other=0.0)
        s = dot(some, tl.trans(key), 3) * scale
        if cap is not None:
            s = cap * _tanh(s / cap)
        seen = (t[None, :] >= begin[:, None]) & (t[None, :] < tl.minimum(end, high)[:, None])
        s = tl.where(seen, s * _LOG2_E, float("-inf"))
        highest = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(highest == float("-inf"), 0.0, highest)  # a row that has seen nothing yet
        p = tl.exp2(s - safe[:, None])
        kept = tl.exp2(top - safe)
        value = tl.load(v + t.to(tl.int64)[:, None] * v_token + d[None, :], mask=held, other=0.0)
        total = total * kept + tl.sum(p, 1)
        acc = acc * kept[:, None] + dot(p, value, PARTS)
        top = highest
    slot = (pair * rows + r) * chunks + chunk
    tl.store(tops + slot, top, mask=r < rows)
    tl.store(totals + slot, total, mask=r < rows)
    tl.store(sums + slot[:, None] * dim + d[None, :], acc, mask=mine)


@triton.jit(do_not_specialize=["chunks"])
def _merge(sums, tops, totals, out, lse, dim, chunks, MERGED: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    top = tl.full([MERGED], float("-inf"), tl.float32)
    for at in range(0, chunks, MERGED):
        c = at + tl.arange(0, MERGED)
        top = tl.maximum(top, tl.load(tops + row * chunks + c, mask=c < chunks, other=float("-inf")))
    highest = tl.max(top, 0)
    safe = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.zeros([MERGED], tl.float32)
    acc = tl.zeros([MERGED, BLOCK_D], tl.float32)
    for at in range(0, chunks, MERGED):
        c = at + tl.arange(0, MERGED)
        slot = row * chunks + c
        weight = tl.exp2(tl.load(tops + slot, mask=c < chunks, other=float("-inf")) - safe)
        total += weight * tl.load(totals + slot, mask=c < chunks, other=0.0)
        held = (c < chunks)[:, None] & (d < dim)[None, :]
        part = tl.load(sums + slot[:, None] * dim + d[None, :], mask=held, other=0.0)
        acc += weight[:, None] * part
    whole = tl.sum(total, 0)
    some = tl.where(whole > 0, whole, 1.0)
    y = tl.sum(acc, 0) / some
    tl.store(out + row * dim + d, rounded(y, out.dtype.element_ty), mask=d < dim)
    tl.store(lse + row, tl.where(whole > 0, (safe + tl.log2(some)) * _LN_2, float("-inf")))


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
    if (why := misplaced(q, k, v, first, length)) is not None:
        return why
    if k.dtype != v.dtype or not {q.dtype, k.dtype} <= set(_DTYPES):
        return f"{q.dtype} over {k.dtype} and {v.dtype}"
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"heads of {q.shape[-1]}, more than {MAX_HEAD_DIM}"
    if k.stride(-1) != 1 or v.stride(-1) != 1:
        return "a key or value is not contiguous"
    rows = q.numel() // q.shape[-1] // max(1, k.shape[0] * k.shape[1])
    if not 0 < rows <= MAX_ROWS or k.shape[2] == 0:
        return f"{rows} rows for a key head, of at most {MAX_ROWS}, over {k.shape[2]} tokens"
    if any(t is not None and (t.dtype != torch.int64 or not t.is_contiguous()) for t in (first, length)):
        return "bounds that are not contiguous int64"
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
    """See offload.kernels.reference.decode_attention."""
    batch, heads, dim = q.shape[0], q.shape[1], q.shape[-1]
    kv_heads, tokens = k.shape[1], k.shape[2]
    queries = q.shape[2] if q.dim() == 4 else 1
    rows, chunks = heads // kv_heads * queries, triton.cdiv(tokens, CHUNK)
    block, wide = blocks(dim)
    every = batch * heads * queries
    sums = torch.empty(every, chunks, dim, dtype=torch.float32, device=q.device)
    tops, totals = torch.empty(2, every, chunks, dtype=torch.float32, device=q.device).unbind()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    with on(q):
        _attend[(batch * kv_heads, chunks, triton.cdiv(rows, TILE_ROWS))](
            q.contiguous(), k, v, sums, tops, totals, first, length,
            float(scale), None if softcap is None else float(softcap), window or 0,
            tokens, kv_heads, rows, queries, dim, chunks, *k.stride()[:3], *v.stride()[:3],
            ROWS=TILE_ROWS, CHUNK=CHUNK, BLOCK_T=block, BLOCK_D=wide, PARTS=3 if q.dtype == torch.float32 else 2,
            num_stages=3 if k.itemsize == 2 else 2,  # what is read ahead must fit into 99 KiB, as small GPUs have
        )  # fmt: skip
        _merge[(every,)](sums, tops, totals, out, lse, dim, chunks, MERGED=_MERGED, BLOCK_D=wide)
    return out, lse
