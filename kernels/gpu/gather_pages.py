"""Pages of a pool copied side by side, whatever they hold."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from offload.kernels.gpu.launch import misplaced, on

_BLOCK_NBYTES = 8 << 10  # of a page, for one program: 64 bytes for each of its 128 threads
_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)


@triton.jit
def _gather(pool, table, out, pages, page, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(table + i).to(tl.int64)
    # A page that the pool does not have is zeros: what lies beyond the pool is never read.
    known = tl.where((source >= 0) & (source < pages), page, 0)
    tl.store(out + i * page + at, tl.load(pool + source * page + at, mask=at < known, other=0), mask=at < page)


def word_of(nbytes: int, *addresses: int) -> torch.dtype:
    """The widest integers that pages of so many bytes at these addresses can be copied as."""
    return next(word for word in _WORDS if all(n % word.itemsize == 0 for n in (nbytes, *addresses)))


def refuses(pool: torch.Tensor, table: torch.Tensor, out: torch.Tensor | None = None) -> str | None:
    """Why `gather_pages` would not take these; None when it does."""
    if (why := misplaced(pool, table, out)) is not None:
        return why
    if table.dtype not in (torch.int32, torch.int64):
        return f"a table of {table.dtype}"
    if not (pool.is_contiguous() and table.is_contiguous() and (out is None or out.is_contiguous())):
        return "not contiguous"
    return None


def gather_pages(pool: torch.Tensor, table: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """See offload.kernels.reference.gather_pages. An index that the pool does not have gives zeros, not an error."""
    if out is None:
        out = torch.empty(len(table), *pool.shape[1:], dtype=pool.dtype, device=pool.device)
    if out.numel() == 0:
        return out
    nbytes = out.nbytes // len(out)
    word = word_of(nbytes, pool.data_ptr(), out.data_ptr())
    page, block = nbytes // word.itemsize, _BLOCK_NBYTES // word.itemsize
    grid = len(table), triton.cdiv(page, block)
    with on(pool):
        _gather[grid](_words(pool, word), table, _words(out, word), len(pool), page, BLOCK=block)
    return out


def _words(tensor: torch.Tensor, word: torch.dtype) -> torch.Tensor:
    """Contiguous memory seen as integers: a kernel needs the address and a width."""
    flat = tensor.view(-1)
    return flat.view(torch.uint8).view(word) if flat.itemsize != word.itemsize else flat.view(word)
