"""Pages of a pool, side by side."""

from __future__ import annotations

import torch


def gather_pages(pool: torch.Tensor, table: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """The pages that a table names, in its order.

    Args:
        pool: [pages, ...]: pages of keys and values [page_tokens, heads, head_dim], say, or rows; any dtype.
        table: int32 or int64 [n], each from 0 to pages - 1; a page may be named more than once.
        out: [n, ...] of the pool's dtype, contiguous, to write to; default: a new tensor.
    """
    return torch.index_select(pool, 0, table, out=out)
