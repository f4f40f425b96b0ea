"""Random bits and normal numbers, 16 lanes at a time: Philox-4x32 and Box and Muller's transform.

offload.kernels.reference.directions says what they are; both give the same bits.
"""

from __future__ import annotations

from typing import Any

from numba import float32, uint32

from offload.kernels.cpu.convert import as_f32, as_u32, to_f32
from offload.kernels.cpu.helper import helper
from offload.kernels.cpu.vector import fma, splat_f32, splat_u32, sqrt, upper_product
from offload.kernels.reference.directions import COS, LOG, LOG_2, MULTIPLIERS, ROOT_HALF, ROUNDS, SIN, WEYL

M0, M1 = MULTIPLIERS
W0, W1 = WEYL
L0, L1, L2, L3, L4, L5, L6 = LOG
S0, S1, S2 = SIN
C0, C1, C2, C3 = COS
FROM_ROOT_HALF = 0x3F800000 - ROOT_HALF


@helper(inline=True)
def philox(c0: Any, c1: Any, c2: Any, c3: Any, k0: int, k1: int) -> Any:
    """Four vectors of 32 random bits for counters of four words; the key is two numbers of 32 bits."""
    m0, m1 = splat_u32(uint32(M0)), splat_u32(uint32(M1))
    for _ in range(ROUNDS):
        high0, low0 = upper_product(c0, m0), c0 * m0
        high1, low1 = upper_product(c2, m1), c2 * m1
        c0, c1, c2, c3 = high1 ^ c1 ^ splat_u32(uint32(k0)), low1, high0 ^ c3 ^ splat_u32(uint32(k1)), low0
        k0, k1 = k0 + W0, k1 + W1
    return c0, c1, c2, c3


@helper(inline=True)
def normals(word: Any) -> Any:
    """Two vectors of independent normals."""
    bits = as_u32(to_f32((word >> splat_u32(uint32(13))) | splat_u32(uint32(1))))
    exponent = (bits + splat_u32(uint32(FROM_ROOT_HALF))) >> splat_u32(uint32(23))
    f = as_f32(bits - ((exponent - splat_u32(uint32(127))) << splat_u32(uint32(23)))) - splat_f32(float32(1))
    p = splat_f32(float32(L0))
    p = fma(p, f, splat_f32(float32(L1)))
    p = fma(p, f, splat_f32(float32(L2)))
    p = fma(p, f, splat_f32(float32(L3)))
    p = fma(p, f, splat_f32(float32(L4)))
    p = fma(p, f, splat_f32(float32(L5)))
    p = fma(p, f, splat_f32(float32(L6)))
    whole = to_f32(exponent - splat_u32(uint32(146))) * splat_f32(float32(LOG_2))
    radius = sqrt(fma(p, f, whole))
    y = to_f32((word & splat_u32(uint32(0x3FFC))) >> splat_u32(uint32(1))) - splat_f32(float32(4095))
    square = y * y
    sine = fma(splat_f32(float32(S0)), square, splat_f32(float32(S1)))
    sine = fma(sine, square, splat_f32(float32(S2))) * y
    cosine = fma(splat_f32(float32(C0)), square, splat_f32(float32(C1)))
    cosine = fma(cosine, square, splat_f32(float32(C2)))
    cosine = fma(cosine, square, splat_f32(float32(C3)))
    sign = splat_u32(uint32(0x80000000))
    one, other = radius * (cosine - sine), radius * (cosine + sine)
    return (
        as_f32(as_u32(one) ^ (word << splat_u32(uint32(31)))),
        as_f32(as_u32(other) ^ ((word << splat_u32(uint32(30))) & sign)),
    )
