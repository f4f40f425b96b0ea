"""Powers of two of 16 float32 at once, for softmax."""

from __future__ import annotations

from typing import Any

from numba import float32, uint32

from offload.kernels.cpu.convert import as_f32, as_u32
from offload.kernels.cpu.helper import helper
from offload.kernels.cpu.lanes import where_less
from offload.kernels.cpu.vector import fma, splat_f32, splat_u32

LOG2_E = 1.4426950408889634
C1, C2, C3 = 0.6931471824645996, 0.24022647738456726, 0.055503323674201965
C4, C5, C6 = 0.00961843691766262, 0.0013398875016719103, 0.00015353361959569156
_ROUND = 1.5 * 2**23  # added to a small float32, it leaves the nearest whole number in the lowest bits


@helper
def exp2(y: Any) -> Any:
    """2 to the power of y, for y up to 127; 0 below -126, and a NaN for a NaN.

    The whole part of y goes into the exponent; for the rest, between -1/2 and 1/2, there is a polynomial fitted for the
    smallest relative error. Off by at most 1.5 units in the last place (tests/kernels/test_exp.py).
    """
    shifted = y + splat_f32(float32(_ROUND))
    f = y - (shifted - splat_f32(float32(_ROUND)))
    p = splat_f32(float32(C6))
    p = fma(p, f, splat_f32(float32(C5)))
    p = fma(p, f, splat_f32(float32(C4)))
    p = fma(p, f, splat_f32(float32(C3)))
    p = fma(p, f, splat_f32(float32(C2)))
    p = fma(p, f, splat_f32(float32(C1)))
    p = fma(p, f, splat_f32(float32(1)))
    power = as_f32(as_u32(p) + (as_u32(shifted) << splat_u32(uint32(23))))
    return where_less(y, splat_f32(float32(-126)), splat_f32(float32(0)), power)
