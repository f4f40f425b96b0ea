"""Rotary embedding of queries and keys in one call, with the roundings of the ops that it stands for."""

from __future__ import annotations

from typing import Any

import torch
from numba import int64

from offload.kernels.cpu.convert import through_bf16
from offload.kernels.cpu.helper import helper
from offload.kernels.cpu.memory import claim, get_i64, load_bf16, load_f32, store_bf16, store_f32
from offload.kernels.cpu.team import TeamFunction, team_function

_ROWS = 128  # heads of tokens that a thread claims


def _make(name: str, load: Any, store: Any, is_bf16: bool) -> TeamFunction:
    @helper
    def rounded(value: Any) -> Any:
        return through_bf16(value) if is_bf16 else value

    @helper
    def turn(x: int, cos: int, sin: int, half: int, out: int, k: int) -> None:
        """16 planes."""
        low, high = load(x, k), load(x, half + k)
        store(out, k, rounded(low * load(cos, k)) - rounded(high * load(sin, k)))
        store(out, half + k, rounded(high * load(cos, half + k)) + rounded(low * load(sin, half + k)))

    @team_function(name)
    def rotary(block: int) -> None:
        pieces, half, tokens = get_i64(block, 1), get_i64(block, 2), get_i64(block, 3)
        q_rows, rows, q_heads, k_heads = get_i64(block, 4), get_i64(block, 5), get_i64(block, 6), get_i64(block, 7)
        cos, sin, angle_batch, angle_token = (
            get_i64(block, 8),
            get_i64(block, 9),
            get_i64(block, 10),
            get_i64(block, 11),
        )
        piece = claim(block)
        while piece < pieces:
            for number in range(piece * _ROWS, min(rows, (piece + 1) * _ROWS)):
                of_q = number < q_rows
                row, heads, at = number, q_heads, block + 12 * 8
                if not of_q:
                    row, heads, at = number - q_rows, k_heads, block + 20 * 8
                token, head, sequence = row % tokens, row // tokens % heads, row // tokens // heads
                x = get_i64(at, 0) + sequence * get_i64(at, 1) + head * get_i64(at, 2) + token * get_i64(at, 3)
                out = get_i64(at, 4) + sequence * get_i64(at, 5) + head * get_i64(at, 6) + token * get_i64(at, 7)
                angle, end = sequence * angle_batch + token * angle_token, half - 16
                for k in range(int64(0), end, 16):
                    turn(x, cos + angle, sin + angle, half, out, k)
                turn(x, cos + angle, sin + angle, half, out, end)  # may overlap others
            piece = claim(block)

    return rotary


_FUNCTIONS = {
    torch.bfloat16: _make("rotary_bf16", load_bf16, store_bf16, True),
    torch.float32: _make("rotary_f32", load_f32, store_f32, False),
}


def refuses(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> str | None:
    """Why `rotary` would not take these; None when it does."""
    if q.device.type != "cpu":
        return f"on {q.device}"
    if q.dtype not in _FUNCTIONS or any(t.dtype != q.dtype for t in (k, cos, sin)):
        return f"{q.dtype} and {k.dtype} by {cos.dtype} and {sin.dtype}"
    batch, _, tokens, dim = q.shape
    if (k.shape[0], k.shape[2], k.shape[3]) != (batch, tokens, dim) or dim % 2 or dim < 32 or q.numel() == 0:
        return f"heads of shape {tuple(q.shape)} and {tuple(k.shape)}"
    if cos.shape != sin.shape or cos.shape[0] not in (1, batch) or cos.shape[1:] != (tokens, dim):
        return f"angles of shape {tuple(cos.shape)} for {tokens} tokens of {dim}"
    return None if all(t.stride(-1) == 1 for t in (q, k, cos, sin)) else "rows that do not lie in one piece"


def rotary(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See offload.kernels.reference.rotary; the same bits. Results lie as q and k do, where those lie densely."""
    outs = torch.empty_like(q), torch.empty_like(k)
    batch, tokens, dim = q.shape[0], q.shape[2], q.shape[3]
    sin = sin if sin.stride() == cos.stride() else sin.contiguous()
    cos = cos if sin.stride() == cos.stride() else cos.contiguous()
    q_rows, rows = batch * q.shape[1] * tokens, batch * (q.shape[1] + k.shape[1]) * tokens
    places = [
        number
        for pair in zip((q, k), outs, strict=True)
        for x in pair
        for number in (x.data_ptr(), *(stride * x.itemsize for stride in x.stride()[:3]))
    ]
    _FUNCTIONS[q.dtype](
        -(-rows // _ROWS), dim // 2, tokens, q_rows, rows, q.shape[1], k.shape[1], cos.data_ptr(), sin.data_ptr(),
        cos.stride(0) * cos.itemsize if cos.shape[0] > 1 else 0, cos.stride(1) * cos.itemsize, *places,
    )  # fmt: skip
    return outs
