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
def dot(a, b):
    """float32 [m, n] from a [m, k] and b [k, n], both bf16 or both fp16: exact products, summed in float32."""
    if _INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b)


@triton.jit
def dot_whole(x, q):
    """float32 [m, n] from x [m, k] of any dtype and whole numbers q [k, n] of at most 256: exact products.

    bf16 and fp16 hold such numbers, so tensor cores multiply 16-bit x by them as it is. A float32 x is the sum of three
    bf16 numbers, eight bits each.
    """
    if x.dtype == tl.float32:
        whole = q.to(tl.float32).to(tl.bfloat16)
        high = rounded(x, tl.bfloat16)
        rest = x - high.to(tl.float32)
        middle = rounded(rest, tl.bfloat16)
        low = rounded(rest - middle.to(tl.float32), tl.bfloat16)
        return dot(high, whole) + (dot(middle, whole) + dot(low, whole))
    else:
        return dot(x, q.to(tl.float32).to(x.dtype))
