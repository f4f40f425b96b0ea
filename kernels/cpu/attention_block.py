"""Attention of four query rows over a block of tokens: scores, their softmax so far, and the weighted sum of values.

The four rows (query heads that share a key and value head) go together: every key and value is read once, widened in
registers and used four times. Scores of four rows by four tokens fill one vector, lane 4 * row + token, so that maxima,
exponentials and masks serve all rows at once.

16-bit numbers are widened in pairs where that is cheaper: `load2` gives 32 of them as two vectors, in an order of its
own, the same for queries, keys and values; the sums come out in that order and are put right once, at the end. Head
dimensions behind the last whole 64 are widened 16 at a time, in order.
"""

from __future__ import annotations

from typing import Any

from numba import float32, int64, uint32

from offload.kernels.cpu.convert import as_f32, as_u32
from offload.kernels.cpu.exp import LOG2_E, exp2
from offload.kernels.cpu.helper import helper
from offload.kernels.cpu.lanes import lane_numbers, larger, largest_of_4, totals, where_equal, where_less
from offload.kernels.cpu.memory import get_f32, load_f32, load_u32, prefetch, store_f32
from offload.kernels.cpu.vector import fma, fma_pairs, magnitude, splat_f32, splat_u32

BLOCK = 64  # tokens
STATE = 16 * 3 + BLOCK * 4  # floats of scratch for four rows: largest, sum, correction, weights

_INFINITY = float("inf")


@helper
def wide4(w: Any, x: Any, sums: Any) -> Any:
    """Four vectors by one, added to four sums."""
    return fma(w[0], x, sums[0]), fma(w[1], x, sums[1]), fma(w[2], x, sums[2]), fma(w[3], x, sums[3])


@helper
def _capped(scores: Any, cap: Any) -> Any:
    """cap * tanh(scores / cap)."""
    ratio = scores / splat_f32(cap)
    t = exp2(magnitude(ratio) * splat_f32(float32(-2 * LOG2_E)))
    one = splat_f32(float32(1))
    tanh = (one - t) / (one + t)
    sign = as_u32(ratio) & splat_u32(uint32(0x80000000))
    return as_f32(as_u32(tanh) | sign) * splat_f32(cap)


@helper
def _dots(w: Any, x: Any, sums: Any) -> Any:
    """Four rows of pairs of bf16 by one."""
    return (
        fma_pairs(w[0], x, sums[0]),
        fma_pairs(w[1], x, sums[1]),
        fma_pairs(w[2], x, sums[2]),
        fma_pairs(w[3], x, sums[3]),
    )


def make_block(load: Any, load2: Any, itemsize: int) -> tuple[Any, Any]:
    """(scores, values) for keys and values that `load` reads 16 at a time and `load2` 32 at a time."""

    @helper
    def four_by_four(q: int, k0: int, k1: int, k2: int, k3: int, dim: int) -> Any:
        """Products of four rows of float32 with four keys."""
        zero = splat_f32(float32(0))
        a = b = c = d = (zero, zero, zero, zero)
        q1, q2, q3 = q + 4 * dim, q + 8 * dim, q + 12 * dim
        paired, i = dim // 64 * 64, int64(0)
        while i < paired:
            (e0, o0), (e1, o1), (e2, o2), (e3, o3) = load2(k0, i), load2(k1, i), load2(k2, i), load2(k3, i)
            even, odd = (e0, e1, e2, e3), (o0, o1, o2, o3)
            a = wide4(odd, load_f32(q, i + 16), wide4(even, load_f32(q, i), a))
            b = wide4(odd, load_f32(q1, i + 16), wide4(even, load_f32(q1, i), b))
            c = wide4(odd, load_f32(q2, i + 16), wide4(even, load_f32(q2, i), c))
            d = wide4(odd, load_f32(q3, i + 16), wide4(even, load_f32(q3, i), d))
            i += 32
        while i < dim:
            four = load(k0, i), load(k1, i), load(k2, i), load(k3, i)
            a, b = wide4(four, load_f32(q, i), a), wide4(four, load_f32(q1, i), b)
            c, d = wide4(four, load_f32(q2, i), c), wide4(four, load_f32(q3, i), d)
            i += 16
        return totals(a + b + c + d)

    @helper
    def four_by_four_bf16(q: int, k0: int, k1: int, k2: int, k3: int, dim: int) -> Any:
        """The same with four rows of bf16, as far apart as if they were float32."""
        zero = splat_f32(float32(0))
        a = b = c = d = (zero, zero, zero, zero)
        q1, q2, q3 = q + 4 * dim, q + 8 * dim, q + 12 * dim
        paired, i = dim // 32 * 32, int64(0)
        while i < paired:
            word = i >> 1
            four = load_u32(k0, word), load_u32(k1, word), load_u32(k2, word), load_u32(k3, word)
            a, b = _dots(four, load_u32(q, word), a), _dots(four, load_u32(q1, word), b)
            c, d = _dots(four, load_u32(q2, word), c), _dots(four, load_u32(q3, word), d)
            i += 32
        if i < dim:
            wide = load(k0, i), load(k1, i), load(k2, i), load(k3, i)
            a, b = wide4(wide, load(q, i), a), wide4(wide, load(q1, i), b)
            c, d = wide4(wide, load(q2, i), c), wide4(wide, load(q3, i), d)
        return totals(a + b + c + d)

    @helper
    def scores(
        state: int, q: int, keys: int, stride: int, begin: int, end: int, dim: int, scale: Any, cap: Any,
        masks: bool, token: int, seen_from: Any, seen: Any, ahead: int, stride_ahead: int, narrow: bool,
    ) -> None:  # fmt: skip
        """Weights of the block's tokens `begin` to `end` for four rows, and their softmax's largest score and sum.

        Args:
            state: address of STATE floats: the largest score so far (of 2 to its power), the sums of weights by lane,
                and, as results, by what sums so far are to be multiplied, and the weights.
            q: address of four rows of float32; or of bf16, if `narrow`, as far apart.
            keys: address of token 0 of the block; only tokens from `begin` on, and before `end`, are there.
            masks: whether some row sees only some of these tokens: those from `seen_from`, `seen` many, where the
                block's token 0 has the number `token`.
            ahead: address of the value of the block's token 0, which is wanted next.
        """
        weights, four = state + 4 * 48, int64(begin // 4)
        old = most = load_f32(state, 0)
        minus = splat_f32(float32(-_INFINITY))
        for group in range(four, (end + 3) // 4):
            t = 4 * group
            k0, k1 = keys + max(t, begin) * stride, keys + min(max(t + 1, begin), end - 1) * stride
            k2, k3 = keys + min(max(t + 2, begin), end - 1) * stride, keys + min(t + 3, end - 1) * stride
            for other in range(t, t + 4):
                for line in range(0, dim * itemsize, 64):
                    prefetch(ahead + other * stride_ahead + line)
            if narrow and itemsize == 2:
                s = four_by_four_bf16(q, k0, k1, k2, k3, dim)
            else:
                s = four_by_four(q, k0, k1, k2, k3, dim)
            s = s * splat_f32(scale)
            if cap > float32(0):
                s = _capped(s, cap)
            s = s * splat_f32(float32(LOG2_E))
            if masks:
                number = splat_u32(uint32(token + t)) + (lane_numbers() & splat_u32(uint32(3)))
                s = where_less(number - seen_from, seen, s, minus)
            most = larger(most, s)
            store_f32(weights, 16 * group, s)
        most = largest_of_4(most)
        base = where_equal(most, minus, splat_f32(float32(0)), most)  # rows that saw nothing yet: weights of 0
        correction = exp2(old - base)
        sums = load_f32(state, 16) * correction
        for group in range(four, (end + 3) // 4):
            p = exp2(load_f32(weights, 16 * group) - base)
            sums = sums + p
            store_f32(weights, 16 * group, p)
        store_f32(state, 0, most)
        store_f32(state, 16, sums)
        store_f32(state, 32, correction)

    @helper
    def _four(numbers: int, at: int, apart: int) -> Any:
        """Four numbers, each in every lane of a vector."""
        return (
            splat_f32(get_f32(numbers, at)),
            splat_f32(get_f32(numbers, at + apart)),
            splat_f32(get_f32(numbers, at + 2 * apart)),
            splat_f32(get_f32(numbers, at + 3 * apart)),
        )

    @helper
    def _open(sums: int, i: int, dim: int, by: Any) -> Any:
        """16 numbers of the sums of four rows, corrected."""
        return (
            load_f32(sums, i) * by[0],
            load_f32(sums, dim + i) * by[1],
            load_f32(sums, 2 * dim + i) * by[2],
            load_f32(sums, 3 * dim + i) * by[3],
        )

    @helper
    def _close(sums: int, i: int, dim: int, four: Any) -> None:
        store_f32(sums, i, four[0])
        store_f32(sums, dim + i, four[1])
        store_f32(sums, 2 * dim + i, four[2])
        store_f32(sums, 3 * dim + i, four[3])

    @helper
    def values(
        state: int, vs: int, stride: int, begin: int, end: int, dim: int, sums: int, ahead: int, stride_ahead: int
    ) -> None:
        """Adds the values of the block's tokens `begin` to `end`, by their weights, to the sums of four rows.

        Args:
            vs: address of the value of the block's token 0.
            sums: address of four rows of float32.
            ahead: address of the next block's keys, which are wanted next.
        """
        weights, by = state + 4 * 48, _four(state, 32, 4)
        wanted, part = ahead, int64(0)  # in the order in which they lie, or memory does not read ahead by itself
        paired, i = dim // 64 * 64, int64(0)
        while i < paired:
            a, b = _open(sums, i, dim, by), _open(sums, i + 16, dim, by)
            c, d = _open(sums, i + 32, dim, by), _open(sums, i + 48, dim, by)
            for t in range(begin, end):
                p, at = _four(weights, 16 * (t // 4) + t % 4, 4), vs + t * stride
                for line in range(part, part + 64 * itemsize, 64):
                    prefetch(wanted + line)
                part += 64 * itemsize
                if part >= dim * itemsize:
                    wanted, part = wanted + stride_ahead, int64(0)
                even, odd = load2(at, i)
                a, b = wide4(p, even, a), wide4(p, odd, b)
                even, odd = load2(at, i + 32)
                c, d = wide4(p, even, c), wide4(p, odd, d)
            _close(sums, i, dim, a)
            _close(sums, i + 16, dim, b)
            _close(sums, i + 32, dim, c)
            _close(sums, i + 48, dim, d)
            i += 64
        while i < dim:
            a = _open(sums, i, dim, by)
            for t in range(begin, end):
                a = wide4(_four(weights, 16 * (t // 4) + t % 4, 4), load(vs + t * stride, i), a)
            _close(sums, i, dim, a)
            i += 16

    return scores, values


@helper
def load2_f32(address: int, index: int) -> Any:
    """32 float32, in order."""
    return load_f32(address, index), load_f32(address, index + 16)


@helper
def load2_bf16(address: int, index: int) -> Any:
    """32 bf16: those at even places, and those at odd ones. Two are a word, so that a shift or a mask widens."""
    words = load_u32(address, index >> 1)
    return as_f32(words << splat_u32(uint32(16))), as_f32(words & splat_u32(uint32(0xFFFF0000)))
