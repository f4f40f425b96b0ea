"""Products of a few stored rows with a few rows of x: the sums that every linear kernel here makes.

A sum is one chain of 16 lanes, then what is left over, always by the same steps; four stored rows go at once, by one or
by four rows of x, so that sixteen chains hide each other's latency and every load is used four times. A result does not
depend on what else was computed beside it.
"""

from __future__ import annotations

from typing import Any

from numba import float32, int64, njit

from offload.kernels.cpu.ahead import ask
from offload.kernels.cpu.lanes import total
from offload.kernels.cpu.memory import get_bf16, get_f32, load_f32, load_pairs
from offload.kernels.cpu.vector import fma, fma_pairs, splat_f32


@njit(error_model="numpy")
def _rest(w: Any, x: Any, sums: Any) -> Any:
    """Four stored numbers by one of x."""
    return sums[0] + w[0] * x, sums[1] + w[1] * x, sums[2] + w[2] * x, sums[3] + w[3] * x


@njit(error_model="numpy")
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

    @njit(error_model="numpy")
    def wide4(w: Any, x: Any, sums: Any) -> Any:
        """Four rows of stored numbers by one row of x."""
        a, b = accumulate(w[0], x, sums[0]), accumulate(w[1], x, sums[1])
        return a, b, accumulate(w[2], x, sums[2]), accumulate(w[3], x, sums[3])

    @njit(error_model="numpy")
    def dot4(w: int, stride: int, x: int, count: int) -> Any:
        w1, w2, w3 = w + stride, w + 2 * stride, w + 3 * stride
        zero, none = splat_f32(float32(0)), float32(0)
        a, rest, k, coming = (zero, zero, zero, zero), (none, none, none, none), 0, w
        while k + step <= count:
            ask(coming, 4 * nbytes)
            a = wide4((load(w, k), load(w1, k), load(w2, k), load(w3, k)), load_x(x, k), a)
            k, coming = k + step, coming + 4 * nbytes
        while k < count:
            rest = _rest((get(w, k), get(w1, k), get(w2, k), get(w3, k)), get_x(x, k), rest)
            k += 1
        return _totals(a, rest)

    @njit(error_model="numpy")
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

    @njit(error_model="numpy")
    def write(y: int, at: int, n: int, value: Any, scale: int, bias: int) -> None:
        by = get_f32(scale, n) if scale else float32(1)
        put(y, at + n, value * by + (get_bias(bias, n) if bias else float32(0)))

    @njit(error_model="numpy")
    def write4(y: int, at: int, n: int, many: int, values: Any, scale: int, bias: int) -> None:
        write(y, at, n, values[0], scale, bias)
        if many == 4:
            write(y, at, n + 1, values[1], scale, bias)
            write(y, at, n + 2, values[2], scale, bias)
            write(y, at, n + 3, values[3], scale, bias)

    @njit(error_model="numpy")
    def multiply(
        weights: int, stride: int, first: int, last: int, x: int, rows: int, outputs: int, inputs: int,
        scale: int, bias: int, y: int,
    ) -> None:  # fmt: skip
        n = first
        while n < last:
            many = 4 if n + 4 <= last else 1  # a single one is computed four times over; that is rare
            w, apart, row = weights + (n - first) * stride, stride if many == 4 else 0, int64(0)
            while row + 4 <= rows:
                a, b, c, d = dot16(w, apart, x + row * inputs * x_nbytes, inputs)
                write4(y, row * outputs, n, many, a, scale, bias)
                write4(y, (row + 1) * outputs, n, many, b, scale, bias)
                write4(y, (row + 2) * outputs, n, many, c, scale, bias)
                write4(y, (row + 3) * outputs, n, many, d, scale, bias)
                row += 4
            while row < rows:
                values = dot4(w, apart, x + row * inputs * x_nbytes, inputs)
                write4(y, row * outputs, n, many, values, scale, bias)
                row += 1
            n += many

    return multiply
