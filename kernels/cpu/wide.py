"""Vectors of 64 lanes: four registers that go through every step together.

For long chains of dependent steps, of which a processor overlaps too few by itself: four at once keep it busy, and the
code says each step once.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.extending import intrinsic

from offload.kernels.cpu.vector import I64, WIDE_F32, WIDE_U32, call, number, unary

LANES = 64


wide_as_f32 = unary(WIDE_F32, WIDE_U32, lambda b, v: b.bitcast(v, WIDE_F32.llvm))  # the same bits
wide_as_u32 = unary(WIDE_U32, WIDE_F32, lambda b, v: b.bitcast(v, WIDE_U32.llvm))
wide_to_f32 = unary(WIDE_F32, WIDE_U32, lambda b, v: b.sitofp(v, WIDE_F32.llvm))  # of signed integers
wide_sqrt = unary(WIDE_F32, WIDE_F32, lambda b, v: call(b, "sqrt.v64f32", WIDE_F32.llvm, [v]))


@intrinsic
def wide_lane_numbers(typing_context: Any) -> Any:
    """0 to 63, a lane each."""
    return WIDE_U32(), lambda context, b, signature, args: ir.Constant(WIDE_U32.llvm, list(range(LANES)))


@intrinsic
def wide_fma(typing_context: Any, x: Any, y: Any, z: Any) -> Any:
    """x * y + z with one rounding."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return call(b, "fma.v64f32", WIDE_F32.llvm, args)

    return WIDE_F32(WIDE_F32, WIDE_F32, WIDE_F32), generate


@intrinsic
def wide_unless_larger(typing_context: Any, value: Any, limit: Any, yes: Any, no: Any) -> Any:
    """`no` where the magnitude of `value` is above `limit`, else `yes`."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        size = call(b, "fabs.v64f32", WIDE_F32.llvm, [args[0]])
        return b.select(b.fcmp_ordered("<", args[1], size), args[3], args[2])

    return WIDE_F32(WIDE_F32, WIDE_F32, WIDE_F32, WIDE_F32), generate


def _halves(b: Any, a: Any, factor: Any) -> tuple[Any, Any]:
    """Products in 64 bits of the lanes at even and at odd places: what processors multiply in one instruction."""
    pairs = ir.VectorType(I64, LANES // 2)
    both, other = (b.bitcast(one, pairs) for one in (a, factor))
    low = number(both, 0xFFFFFFFF)
    even = b.mul(b.and_(both, low), b.and_(other, low))
    odd = b.mul(b.lshr(both, number(both, 32)), b.and_(other, low))
    return even, odd


@intrinsic
def wide_upper(typing_context: Any, a: Any, factor: Any) -> Any:
    """The upper 32 bits of a * factor, of numbers without a sign; `factor` has the same number in all lanes."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        even, odd = _halves(b, *args)
        upper = b.or_(b.lshr(even, number(even, 32)), b.and_(odd, number(odd, 0xFFFFFFFF << 32)))
        return b.bitcast(upper, WIDE_U32.llvm)

    return WIDE_U32(WIDE_U32, WIDE_U32), generate
