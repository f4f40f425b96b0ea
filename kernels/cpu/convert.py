"""One kind of number out of another: numbers of 8 and 16 bits, float32, and bits as they are.

Functions of a builder take a value or a vector; they are what memory's loads and stores are made of.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from offload.kernels.cpu.vector import F32, FLOAT, I16, I32, LANES, U16, U32, number, order, unary


def like(value: Any, kind: Any) -> Any:
    """`kind`, as a vector if `value` is one."""
    return ir.VectorType(kind, value.type.count) if isinstance(value.type, ir.VectorType) else kind


def widen_bf16(b: Any, stored: Any) -> Any:
    wide = b.zext(stored, like(stored, I32))
    return b.bitcast(b.shl(wide, number(wide, 16)), like(stored, FLOAT))


def narrow_bf16(b: Any, value: Any) -> Any:
    """Rounds to nearest, ties to even; a NaN stays one."""
    bits = b.bitcast(value, like(value, I32))
    odd = b.and_(b.lshr(bits, number(bits, 16)), number(bits, 1))
    rounded = b.lshr(b.add(bits, b.add(odd, number(bits, 0x7FFF))), number(bits, 16))
    is_nan = b.icmp_unsigned(">", b.and_(bits, number(bits, 0x7FFFFFFF)), number(bits, 0x7F800000))
    return b.trunc(b.select(is_nan, number(bits, 0x7FC0), rounded), like(value, I16))


def narrow_bf16_pair(b: Any, low: Any, high: Any) -> Any:
    """32 float32 to bf16, the same bits as one by one, with half the work."""
    words = ir.VectorType(I16, 2 * LANES)
    halves = [b.bitcast(one, words) for one in (low, high)]
    rest, kept = (b.shuffle_vector(*halves, order(list(range(first, 4 * LANES, 2)))) for first in (0, 1))
    half = b.sub(number(kept, 0x8000), b.and_(kept, number(kept, 1)))  # a tie goes up from an odd number
    rounded = b.add(kept, b.zext(b.icmp_unsigned(">", rest, half), words))
    nans = [b.fcmp_unordered("uno", one, one) for one in (low, high)]
    is_nan = b.shuffle_vector(*nans, order(list(range(2 * LANES))))
    return b.select(is_nan, number(kept, 0x7FC0), rounded)


def widen_f16(b: Any, stored: Any) -> Any:
    return b.fpext(b.bitcast(stored, like(stored, ir.HalfType())), like(stored, FLOAT))


def narrow_f16(b: Any, value: Any) -> Any:
    return b.bitcast(b.fptrunc(value, like(value, ir.HalfType())), like(value, I16))


def widen_i8(b: Any, stored: Any) -> Any:
    return b.sitofp(b.sext(stored, like(stored, I32)), like(stored, FLOAT))


def pair_up(b: Any, stored: Any) -> Any:
    """32 of 16 bits as 16 pairs."""
    return b.bitcast(stored, U32.llvm)


def zip_halves(b: Any, stored: Any) -> Any:
    """32 of 16 bits as pairs of one in the first half and one in the second."""
    return pair_up(b, b.shuffle_vector(stored, stored, order([i // 2 + i % 2 * 16 for i in range(32)])))


def pair_up_i8(b: Any, stored: Any) -> Any:
    """32 of 8 bits as pairs of bf16, which holds such whole numbers: the upper halves of float32."""
    lanes = stored.type.count
    halves = b.bitcast(widen_i8(b, stored), ir.VectorType(I16, 2 * lanes))
    return pair_up(b, b.shuffle_vector(halves, halves, order(list(range(1, 2 * lanes, 2)))))


as_f32 = unary(F32, U32, lambda b, v: b.bitcast(v, F32.llvm))  # the same bits
as_pairs = unary(U32, U16, pair_up)
as_u32 = unary(U32, F32, lambda b, v: b.bitcast(v, U32.llvm))
to_f32 = unary(F32, U32, lambda b, v: b.sitofp(v, F32.llvm))  # of signed integers
to_i32 = unary(U32, F32, lambda b, v: b.fptosi(v, U32.llvm))  # towards zero
through_f16 = unary(F32, F32, lambda b, v: widen_f16(b, narrow_f16(b, v)))  # the nearest float16
through_bf16 = unary(F32, F32, lambda b, v: widen_bf16(b, narrow_bf16(b, v)))
