"""Products of a few stored rows with a few rows of x: the sums that every linear kernel here makes.

A sum is one chain of 16 lanes, then what is left over, always by the same steps. Four stored rows by four rows of x go
at once, so that sixteen chains hide each other's latency and every load is used four times. For fewer rows of x, stored
rows go one after the other, in the order in which they lie: memory is read faster that way than four rows at a time.
Rows of bytes go by twos, since one chain takes longer over 32 of them than memory does (from a cache four at a time
would be faster still, 66 GB/s against 54 and 40 on two cores; from slow memory, 42 GB/s, two are: 40 against 38).
A result does not depend on what else was computed beside it.
"""

from __future__ import annotations

from typing import Any

from numba import float32, int64

from offload.kernels.cpu.ahead import ask
from offload.kernels.cpu.helper import helper
from offload.kernels.cpu.lanes import total
from offload.kernels.cpu.memory import get_bf16, get_f32, load_f32, load_pairs, prefetch
from offload.kernels.cpu.vector import fma, fma_pairs, splat_f32

NEAR = 4096  # bytes ahead that memory is asked for where stored rows go one by one


@helper
def _rest(w: Any, x: Any, sums: Any) -> Any:
    """Four stored numbers by one of x."""
    return sums[0] + w[0] * x, sums[1] + w[1] * x, sums[2] + w[2] * x, sums[3] + w[3] * x


@helper
def _totals(wide: Any, rest: Any) -> Any:
    return total(wide[0]) + rest[0], total(wide[1]) + rest[1], total(wide[2]) + rest[2], total(wide[3]) + rest[3]


def make_products(load: Any, get: Any, put: Any, get_bias: Any, *, by_pairs: bool, nbytes: int) -> Any:
    """`multiply` for stored numbers that `load` and `get` read, and results that `put` writes.

    multiply(weights, stride, first, last, x, rows, outputs, inputs, scale, bias, y) computes outputs `first` to `last`:
    y[r, n] = scale[n] * sum_k weights[n, k] x[r, k] + bias[n]. All but counts are addresses; `weights` is that of
    output `first`, with `stride` bytes from each to the next; scale and bias may be 0 for none.

    Args:
        by_pairs: x is bf16, and `load` gives 32 numbers as pairs of bf16; else x is float32, and `load` gives 16.
        nbytes: what `load` reads, to ask memory for it in time; 0 for weights that lie in a cache.
    """
    load_x, get_x, accumulate = (load_pairs, get_bf16, fma_pairs) if by_pairs else (load_f32, get_f32, fma)
    step, x_nbytes = (32, 2) if by_pairs else (16, 4)
    by_twos = 0 < nbytes < 64  # see above

    @helper
    def wide4(w: Any, x: Any, sums: Any) -> Any:
        """Four rows of stored numbers by one row of x."""
        a, b = accumulate(w[0], x, sums[0]), accumulate(w[1], x, sums[1])
        return a, b, accumulate(w[2], x, sums[2]), accumulate(w[3], x, sums[3])

    @helper
    def dot1(w: int, x: int, count: int) -> Any:
        a, rest, k, coming = splat_f32(float32(0)), float32(0), 0, w + NEAR
        while k + 2 * step <= count:
            for start in range(0, 2 * nbytes, 64):
                prefetch(coming + start)
            a = accumulate(load(w, k), load_x(x, k), a)
            a = accumulate(load(w, k + step), load_x(x, k + step), a)
            k, coming = k + 2 * step, coming + 2 * nbytes
        while k + step <= count:
            a = accumulate(load(w, k), load_x(x, k), a)
            k += step
        while k < count:
            rest = rest + get(w, k) * get_x(x, k)
            k += 1
        return total(a) + rest

    @helper
    def dot2(w: int, stride: int, x: int, count: int) -> Any:
        """Two rows, one behind the other in memory, which is asked for in that order."""
        w1, zero, none = w + stride, splat_f32(float32(0)), float32(0)
        a, b, ra, rb, k, coming = zero, zero, none, none, 0, w + NEAR
        while k + 2 * step <= count:
            for start in range(0, 4 * nbytes, 64):
                prefetch(coming + start)
            by, more = load_x(x, k), load_x(x, k + step)
            a, b = accumulate(load(w, k), by, a), accumulate(load(w1, k), by, b)
            a, b = accumulate(load(w, k + step), more, a), accumulate(load(w1, k + step), more, b)
            k, coming = k + 2 * step, coming + 4 * nbytes
        while k + step <= count:
            by = load_x(x, k)
            a, b = accumulate(load(w, k), by, a), accumulate(load(w1, k), by, b)
            k += step
        while k < count:
            one = get_x(x, k)
            ra, rb = ra + get(w, k) * one, rb + get(w1, k) * one
            k += 1
        return total(a) + ra, total(b) + rb

    @helper
    def dot16(w: int, stride: int, x: int, count: int) -> Any:
        w1, w2, w3 = w + stride, w + 2 * stride, w + 3 * stride
        x1, x2, x3 = x + x_nbytes * count, x + 2 * x_nbytes * count, x + 3 * x_nbytes * count
        zero, none = splat_f32(float32(0)), float32(0)
        a = b = c = d = (zero, zero, zero, zero)
        ra = rb = rc = rd = (none, none, none, none)
        k, coming = 0, w
        while k + step <= count:
            ask(coming, 4 * nbytes)
            four = load(w, k), load(w1, k), load(w2, k), load(w3, k)
            a = wide4(four, load_x(x, k), a)
            b = wide4(four, load_x(x1, k), b)
            c = wide4(four, load_x(x2, k), c)
            d = wide4(four, load_x(x3, k), d)
            k, coming = k + step, coming + 4 * nbytes
        while k < count:
            one = get(w, k), get(w1, k), get(w2, k), get(w3, k)
            ra = _rest(one, get_x(x, k), ra)
            rb = _rest(one, get_x(x1, k), rb)
            rc = _rest(one, get_x(x2, k), rc)
            rd = _rest(one, get_x(x3, k), rd)
            k += 1
        return _totals(a, ra), _totals(b, rb), _totals(c, rc), _totals(d, rd)

    @helper
    def write(y: int, at: int, n: int, value: Any, scale: int, bias: int) -> None:
        by = get_f32(scale, n) if scale else float32(1)
        put(y, at + n, value * by + (get_bias(bias, n) if bias else float32(0)))

    @helper
    def write4(y: int, at: int, n: int, many: int, values: Any, scale: int, bias: int) -> None:
        write(y, at, n, values[0], scale, bias)
        if many == 4:
            write(y, at, n + 1, values[1], scale, bias)
            write(y, at, n + 2, values[2], scale, bias)
            write(y, at, n + 3, values[3], scale, bias)

    @helper
    def multiply(
        weights: int, stride: int, first: int, last: int, x: int, rows: int, outputs: int, inputs: int,
        scale: int, bias: int, y: int,
    ) -> None:  # fmt: skip
        n = first
        while by_twos and rows < 4 and n + 2 <= last:
            for row in range(rows):
                pair = dot2(weights + (n - first) * stride, stride, x + row * inputs * x_nbytes, inputs)
                write(y, row * outputs, n, pair[0], scale, bias)
                write(y, row * outputs, n + 1, pair[1], scale, bias)
            n += 2
        while n < last:
            many = 4 if rows >= 4 and n + 4 <= last else 1
            w, apart, row = weights + (n - first) * stride, stride if many == 4 else 0, int64(0)
            while row + 4 <= rows:  # a single stored row is computed four times over; that is rare
                a, b, c, d = dot16(w, apart, x + row * inputs * x_nbytes, inputs)
                write4(y, row * outputs, n, many, a, scale, bias)
                write4(y, (row + 1) * outputs, n, many, b, scale, bias)
                write4(y, (row + 2) * outputs, n, many, c, scale, bias)
                write4(y, (row + 3) * outputs, n, many, d, scale, bias)
                row += 4
            while row < rows:
                for i in range(many):
                    value = dot1(w + i * stride, x + row * inputs * x_nbytes, inputs)
                    write(y, row * outputs, n + i, value, scale, bias)
                row += 1
            n += many

    return multiply
