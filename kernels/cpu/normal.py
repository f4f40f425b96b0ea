"""Random bits and normal numbers, 64 lanes at a time: Philox-4x32 and Box and Muller's transform.

offload.kernels.reference.directions says what they are; both give the same bits.
"""

from __future__ import annotations

from typing import Any

from numba import float32, uint32

from offload.kernels.cpu.helper import helper
from offload.kernels.cpu.vector import wide_f32, wide_u32
from offload.kernels.cpu.wide import wide_as_f32, wide_as_u32, wide_fma, wide_sqrt, wide_to_f32, wide_upper
from offload.kernels.reference.directions import COS, LOG, LOG_2, MULTIPLIERS, ROOT_HALF, ROUNDS, SIN, WEYL

M0, M1 = MULTIPLIERS
W0, W1 = WEYL
L0, L1, L2, L3, L4, L5, L6 = LOG
S0, S1, S2 = SIN
C0, C1, C2, C3 = COS
FROM_ROOT_HALF = 0x3F800000 - ROOT_HALF


@helper(inline=True)
def philox(c0: Any, c1: Any, c2: Any, c3: Any, k0: int, k1: int) -> Any:
    """Four vectors of random bits for counters of four words; the key is two numbers of 32 bits."""
    m0, m1 = wide_u32(uint32(M0)), wide_u32(uint32(M1))
    for _ in range(ROUNDS):
        high0, low0 = wide_upper(c0, m0), c0 * m0
        high1, low1 = wide_upper(c2, m1), c2 * m1
        c0, c1, c2, c3 = high1 ^ c1 ^ wide_u32(uint32(k0)), low1, high0 ^ c3 ^ wide_u32(uint32(k1)), low0
        k0, k1 = k0 + W0, k1 + W1
    return c0, c1, c2, c3


@helper(inline=True)
def normals(word: Any) -> Any:
    """Two vectors of independent normals."""
    bits = wide_as_u32(wide_to_f32((word >> wide_u32(uint32(13))) | wide_u32(uint32(1))))
    exponent = (bits + wide_u32(uint32(FROM_ROOT_HALF))) >> wide_u32(uint32(23))
    f = wide_as_f32(bits - ((exponent - wide_u32(uint32(127))) << wide_u32(uint32(23)))) - wide_f32(float32(1))
    p = wide_f32(float32(L0))
    p = wide_fma(p, f, wide_f32(float32(L1)))
    p = wide_fma(p, f, wide_f32(float32(L2)))
    p = wide_fma(p, f, wide_f32(float32(L3)))
    p = wide_fma(p, f, wide_f32(float32(L4)))
    p = wide_fma(p, f, wide_f32(float32(L5)))
    p = wide_fma(p, f, wide_f32(float32(L6)))
    whole = wide_to_f32(exponent - wide_u32(uint32(146))) * wide_f32(float32(LOG_2))
    radius = wide_sqrt(wide_fma(p, f, whole))
    y = wide_to_f32((word & wide_u32(uint32(0x3FFC))) >> wide_u32(uint32(1))) - wide_f32(float32(4095))
    square = y * y
    sine = wide_fma(wide_f32(float32(S0)), square, wide_f32(float32(S1)))
    sine = wide_fma(sine, square, wide_f32(float32(S2))) * y
    cosine = wide_fma(wide_f32(float32(C0)), square, wide_f32(float32(C1)))
    cosine = wide_fma(cosine, square, wide_f32(float32(C2)))
    cosine = wide_fma(cosine, square, wide_f32(float32(C3)))
    one, other = radius * (cosine - sine), radius * (cosine + sine)
    return (
        wide_as_f32(wide_as_u32(one) ^ (word << wide_u32(uint32(31)))),
        wide_as_f32(wide_as_u32(other) ^ ((word << wide_u32(uint32(30))) & wide_u32(uint32(0x80000000)))),
    )
