"""Vectors of 64 lanes: four registers that go through every step together.

For long chains of dependent steps, of which a processor overlaps too few by itself: four at once keep it busy, and the
code says each step once.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.extending import intrinsic

from offload.kernels.cpu.convert import narrow_bf16
from offload.kernels.cpu.vector import I16, I64, WIDE_F32, WIDE_U16, WIDE_U32, Bfloat, call, number, order, unary

LANES = 64


wide_as_f32 = unary(WIDE_F32, WIDE_U32, lambda b, v: b.bitcast(v, WIDE_F32.llvm))  # the same bits
wide_as_u32 = unary(WIDE_U32, WIDE_F32, lambda b, v: b.bitcast(v, WIDE_U32.llvm))
wide_to_f32 = unary(WIDE_F32, WIDE_U32, lambda b, v: b.sitofp(v, WIDE_F32.llvm))  # of signed integers
wide_sqrt = unary(WIDE_F32, WIDE_F32, lambda b, v: call(b, "sqrt.v64f32", WIDE_F32.llvm, [v]))


@intrinsic
def wide_lane_numbers(typing_context: Any) -> Any:
    """0 to 63, a lane each."""
    return WIDE_U32(), lambda context, b, signature, args: ir.Constant(WIDE_U32.llvm, list(range(LANES)))


def _joined(b: Any, parts: list[Any]) -> Any:
    """Vectors one behind the other."""
    while len(parts) > 1:
        lanes = order(list(range(2 * parts[0].type.count)))
        parts = [b.shuffle_vector(low, high, lanes) for low, high in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


@intrinsic
def wide_to_bf16(typing_context: Any, value: Any) -> Any:
    """The nearest bf16, ties to even; what is below the smallest normal number is zero, as AVX512-BF16 has it."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        value = args[0]
        if "+avx512bf16" in context.codegen().magic_tuple()[2]:
            parts = [b.shuffle_vector(value, value, order(list(range(k, k + 16)))) for k in range(0, LANES, 16)]
            pairs = zip(parts[::2], parts[1::2], strict=True)
            kind = ir.VectorType(Bfloat(), 32)
            made = [call(b, "x86.avx512bf16.cvtne2ps2bf16.512", kind, [high, low]) for low, high in pairs]
            return _joined(b, [b.bitcast(one, ir.VectorType(I16, 32)) for one in made])
        bits = b.bitcast(value, WIDE_U32.llvm)
        is_tiny = b.icmp_unsigned("==", b.and_(bits, number(bits, 0x7F800000)), number(bits, 0))
        sign = b.trunc(b.lshr(b.and_(bits, number(bits, 0x80000000)), number(bits, 16)), WIDE_U16.llvm)
        return b.select(is_tiny, sign, narrow_bf16(b, value))

    return WIDE_U16(WIDE_F32), generate


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
