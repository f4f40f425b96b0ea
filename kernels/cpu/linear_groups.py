"""y = x W_g^T for groups of rows, each by a matrix of its own: the products of a mixture's experts, in one call.

Groups of few rows are multiplied as `linear` does and others as `linear_many`: the same steps, so the same bits as
those give for a group alone. torch makes a kernel for every number of rows that it has not met (oneDNN's primitives),
and the groups of a prompt have dozens of them; here there is nothing to make. Threads take pieces of all groups from
one counter, so that nobody waits at the end of a matrix.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import accumulate

import torch
from numba import int64

from offload.kernels.cpu.dot import make_products
from offload.kernels.cpu.linear_many import MIN_ROWS, WIDE, has_pairs, scratch, scratch_nbytes, strip
from offload.kernels.cpu.memory import claim, get_bf16, get_i64, load_pairs, put_bf16
from offload.kernels.cpu.team import team_function

PIECE_NBYTES = 128 << 10  # of weights, at least: processors prefetch better in one long run
_multiply_few = make_products(load_pairs, get_bf16, put_bf16, get_bf16, by_pairs=True, nbytes=64)


@team_function("linear_groups_bf16")
def _groups(block: int) -> None:
    pieces, x, w, y, table = (
        get_i64(block, 1),
        get_i64(block, 2),
        get_i64(block, 3),
        get_i64(block, 4),
        get_i64(block, 5),
    )
    each, tall, outputs, inputs = get_i64(block, 6), get_i64(block, 7), get_i64(block, 8), get_i64(block, 9)
    packed = get_i64(block, 10) + claim(block + 12 * 8) * get_i64(block, 11)  # this thread's
    stride, piece = 2 * inputs, claim(block)
    while piece < pieces:
        coming = claim(block)
        entry, first = table + 24 * (piece // each), piece % each * tall
        start, rows = get_i64(entry, 1), get_i64(entry, 2)
        matrix, last = w + get_i64(entry, 0) * outputs * stride, min(outputs, first + tall)
        x_at, y_at = x + start * stride, y + 2 * start * outputs
        if rows < MIN_ROWS:
            at = matrix + first * stride
            _multiply_few(at, stride, first, last, x_at, rows, outputs, inputs, int64(0), int64(0), y_at)
        else:
            then, left = int64(0), int64(0)  # what this thread takes after this piece
            if coming < pieces:
                begin = coming % each * tall
                left = min(int64(WIDE), outputs - begin)
                then = w + (get_i64(table + 24 * (coming // each), 0) * outputs + begin) * stride
            for n in range(first, last, WIDE):
                ask, most = then, left
                if n + WIDE < last:
                    ask, most = matrix + (n + WIDE) * stride, min(int64(WIDE), last - n - WIDE)
                height = min(int64(WIDE), last - n)
                strip(
                    x_at, matrix + n * stride, int64(0), y_at + 2 * n, rows, height, outputs, inputs, packed, ask, most
                )
        piece = coming


def refuses(x: torch.Tensor, weight: torch.Tensor, rows: Sequence[int]) -> str | None:
    """Why `linear_groups` would not take these; None when it does."""
    if x.device.type != "cpu":
        return f"on {x.device}"
    if x.dtype != torch.bfloat16 or weight.dtype != torch.bfloat16:
        return f"{x.dtype} by {weight.dtype}"
    if not has_pairs():
        return "a processor without products of pairs of bf16"
    if not (x.is_contiguous() and weight.is_contiguous()):
        return "not contiguous"
    _, outputs, inputs = weight.shape
    if outputs % 16 or inputs % 32 or not outputs or not inputs:
        return f"{outputs} x {inputs}, not multiples of 16 and 32"
    return None


def linear_groups(x: torch.Tensor, weight: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """See offload.kernels.reference.linear_groups.

    Args:
        x: [sum of rows, inputs], contiguous, bfloat16: the rows of the first group, then of the second, and so on.
        weight: [groups, outputs, inputs], contiguous, bfloat16.
        rows: of each group; 0 for those that have none.

    Returns:
        [sum of rows, outputs] of that dtype.
    """
    _, outputs, inputs = weight.shape
    y = torch.empty(x.shape[0], outputs, dtype=x.dtype)
    hit = [(group, end - n, n) for group, (n, end) in enumerate(zip(rows, accumulate(rows), strict=True)) if n]
    if not hit:
        return y
    table = (ctypes.c_int64 * (3 * len(hit)))(*(number for entry in hit for number in entry))
    tall = WIDE * -(-PIECE_NBYTES // (WIDE * inputs * 2))
    each, size = -(-outputs // tall), scratch_nbytes(max(rows))
    places = x.data_ptr(), weight.data_ptr(), y.data_ptr(), ctypes.addressof(table)
    memory = scratch(size * torch.get_num_threads())
    _groups(len(hit) * each, *places, each, tall, outputs, inputs, memory, size, 0)
    return y
