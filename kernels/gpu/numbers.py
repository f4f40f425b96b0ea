"""Rounding and multiplying as GPUs do it, in Triton's interpreter too, which cuts bf16 off and cannot multiply it."""

from __future__ import annotations

import triton
import triton.language as tl

from offload.kernels.gpu.launch import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 as `dtype`: to the nearest, to even between two."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, nearest, (bits >> 16) | 0x40).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def _product(a, b):
    """float32 [m, n] from a [m, k] and b [k, n] of one dtype: exact products, summed in float32."""
    if _INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision="ieee")  # of float32, which is then slow; nothing to bf16 and fp16


@triton.jit
def dot(a, b, PARTS: tl.constexpr):
    """float32 [m, n] from a [m, k] and b [k, n]: products in float32's precision, on tensor cores where b has 16 bits.

    A float32 `a` is taken apart into numbers of b's dtype: PARTS of them, 8 bits each in bf16, of which it has 24.
    """
    if a.dtype == b.dtype:
        return _product(a, b)
    elif a.dtype == tl.float32 and b.dtype != tl.float32:
        high = rounded(a, b.dtype)
        rest = a - high.to(tl.float32)
        middle = rounded(rest, b.dtype)
        total = _product(middle, b)
        if PARTS == 3:
            total += _product(rounded(rest - middle.to(tl.float32), b.dtype), b)
        return _product(high, b) + total
    else:
        return _product(a.to(tl.float32), b.to(tl.float32))


@triton.jit
def dot_whole(x, q):
    """float32 [m, n] from x [m, k] of any dtype and whole numbers q [k, n] of at most 256, which all dtypes hold."""
    if x.dtype == tl.float32:
        return dot(x, q.to(tl.float32).to(tl.bfloat16), 3)
    else:
        return dot(x, q.to(tl.float32).to(x.dtype), 1)
