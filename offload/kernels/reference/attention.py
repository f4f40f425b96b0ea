"""Attention of one or a few new tokens over the keys and values of all tokens so far, whole or from parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch


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
    """Softmax attention of the last tokens of each sequence; in float32 unless q is float64.

    What a token of a sequence sees while it generates is one run of its cache: padding on the left, the unused rest
    of a preallocated cache and a sliding window all cut its ends. So a mask is two numbers for a sequence, and what
    they leave out is never read.

    Args:
        q: [batch, heads, head_dim], or [batch, heads, queries, head_dim] for the last `queries` tokens; token i of
            them sees tokens up to itself.
        k, v: [batch, kv_heads, tokens, head_dim]; heads are a multiple of kv_heads, and neighbours share one.
        scale: scores are multiplied by it.
        window: each token sees itself and the `window` - 1 before it.
        softcap: scores s become softcap * tanh(s / softcap).
        first: int64 [batch], the first valid token of each sequence; default 0.
        length: int64 [batch], where valid tokens end, padding included; the last query is the token before. Default:
            all tokens.
        most: no sequence has more valid tokens than this; where sequences share one long run of tokens, so that memory
            is set aside for as many only.

    Returns:
        (attention, of q's shape and dtype; the logarithm of the sum of exponentials of the scores, of q's shape without
        head_dim, in float32). A query that sees nothing gives 0 and -infinity.
    """
    batch, heads, head_dim = q.shape[0], q.shape[1], q.shape[-1]
    kv_heads, tokens = k.shape[1], k.shape[2]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows = q.reshape(batch, kv_heads, heads // kv_heads, -1, head_dim).to(wide)  # [.., queries, head_dim]
    scores = torch.einsum("bhgqd,bhtd->bhgqt", rows, k.to(wide)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    queries = rows.shape[3]
    stop = torch.full((batch,), tokens) if length is None else length
    start = torch.zeros(batch, dtype=torch.int64) if first is None else first
    end = (stop[:, None] - queries + 1 + torch.arange(queries))[:, :, None]  # [batch, queries, 1]
    begin = start[:, None, None] if window is None else torch.maximum(start[:, None, None], end - window)
    token = torch.arange(tokens)
    seen = (token >= begin) & (token < end)
    scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    lse = scores.logsumexp(-1)
    weights = torch.where(seen[:, None, None], (scores - lse[..., None]).exp(), 0)
    out = torch.einsum("bhgqt,bhtd->bhgqd", weights, v.to(wide))
    return out.reshape(q.shape).to(q.dtype), lse.reshape(q.shape[:-1]).float()


def merge_attention(outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """What attention over all tokens gives, from attention over parts of them.

    Args:
        outs: of each part, [..., head_dim].
        lses: of each part, float32 [...]; -infinity where a part has no token to see.

    Returns:
        (attention in the dtype of outs[0], float32 logarithm of the sum of exponentials over all).
    """
    parts = torch.stack(list(lses))
    lse = parts.logsumexp(0)
    weights = torch.where(parts == -torch.inf, 0, (parts - lse).exp())  # also where there is no token at all
    out = sum(part.float() * weight[..., None] for part, weight in zip(outs, weights, strict=True))
    return out.to(outs[0].dtype), lse  # type: ignore[union-attr]
