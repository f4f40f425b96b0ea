"""SIMD vectors for numba, and raw memory: kernels say which lanes they mean instead of hoping for a vectoriser.

A vector has 64 bytes: F32 (16 float32), U32 (16 of 32 bits) or U16 (32 of 16 bits). LLVM splits it where registers are
shorter. Nothing is reordered, so the same numbers give the same bits in every kernel that sums by the same steps.

Addresses are plain integers, as `Tensor.data_ptr()` gives them, and an index counts elements. There are no bounds and
no ownership here: the wrappers that hand an address out check shapes first.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models, register_default
from numba.extending import intrinsic, overload

LANES = 16  # of F32 and U32

_I8, _I16, _I32, _I64, _FLOAT = (*map(ir.IntType, (8, 16, 32, 64)), ir.FloatType())
_NBYTES = {_I8: 1, _I16: 2, _I32: 4, _I64: 8, _FLOAT: 4}


class Vector(types.Type):  # type: ignore[misc]
    """Numba's type of a vector of `lanes` elements of an LLVM type."""

    def __init__(self, name: str, kind: Any, lanes: int) -> None:
        self.kind, self.lanes = kind, lanes
        super().__init__(name=name)

    @property
    def llvm(self) -> Any:
        return ir.VectorType(self.kind, self.lanes)


F32, U32, U16 = Vector("F32", _FLOAT, 16), Vector("U32", _I32, 16), Vector("U16", _I16, 32)


class _Bfloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not have."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Bfloat)

    def __hash__(self) -> int:
        return hash(_Bfloat)


@register_default(Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, vector.llvm)


def _splat(b: Any, value: Any, lanes: int) -> Any:
    undefined = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    first = b.insert_element(undefined, value, _I32(0))
    return b.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes))


def _number(b: Any, like: Any, number: int) -> Any:
    """A constant of the type of `like`, a value or a vector."""
    count = like.type.count if isinstance(like.type, ir.VectorType) else 0
    return ir.Constant(like.type, [number] * count if count else number)


def _as(like: Any, kind: Any) -> Any:
    """`kind`, as a vector if `like` is one."""
    return ir.VectorType(kind, like.type.count) if isinstance(like.type, ir.VectorType) else kind


# Conversions: (builder, stored) -> wide and back, for values and vectors alike. ---------------------------------------


def _widen_bf16(b: Any, stored: Any) -> Any:
    wide = b.zext(stored, _as(stored, _I32))
    return b.bitcast(b.shl(wide, _number(b, wide, 16)), _as(stored, _FLOAT))


def _narrow_bf16(b: Any, value: Any) -> Any:
    """Rounds to nearest, ties to even; a NaN stays one."""
    bits = b.bitcast(value, _as(value, _I32))
    odd = b.and_(b.lshr(bits, _number(b, bits, 16)), _number(b, bits, 1))
    rounded = b.lshr(b.add(bits, b.add(odd, _number(b, bits, 0x7FFF))), _number(b, bits, 16))
    is_nan = b.icmp_unsigned(">", b.and_(bits, _number(b, bits, 0x7FFFFFFF)), _number(b, bits, 0x7F800000))
    return b.trunc(b.select(is_nan, _number(b, bits, 0x7FC0), rounded), _as(value, _I16))


def _widen_f16(b: Any, stored: Any) -> Any:
    return b.fpext(b.bitcast(stored, _as(stored, ir.HalfType())), _as(stored, _FLOAT))


def _narrow_f16(b: Any, value: Any) -> Any:
    return b.bitcast(b.fptrunc(value, _as(value, ir.HalfType())), _as(value, _I16))


def _widen_i8(b: Any, stored: Any) -> Any:
    return b.sitofp(b.sext(stored, _as(stored, _I32)), _as(stored, _FLOAT))


def _pair_up(b: Any, stored: Any) -> Any:
    """32 of 16 bits as 16 pairs."""
    return b.bitcast(stored, U32.llvm)


def _zip(b: Any, stored: Any) -> Any:
    """32 of 16 bits as pairs of one in the first half and one in the second."""
    order = [i // 2 + i % 2 * 16 for i in range(32)]
    return _pair_up(b, b.shuffle_vector(stored, stored, ir.Constant(ir.VectorType(_I32, 32), order)))


def _pair_up_i8(b: Any, stored: Any) -> Any:
    """32 of 8 bits as pairs of bf16, which holds such whole numbers: the upper halves of float32."""
    lanes = stored.type.count
    halves = b.bitcast(_widen_i8(b, stored), ir.VectorType(_I16, 2 * lanes))
    upper = ir.Constant(ir.VectorType(_I32, lanes), list(range(1, 2 * lanes, 2)))
    return _pair_up(b, b.shuffle_vector(halves, halves, upper))


def _same(b: Any, value: Any) -> Any:
    return value


# Memory. --------------------------------------------------------------------------------------------------------------


def _loader(result: Any, stored: Any, convert: Callable[[Any, Any], Any], lanes: int) -> Any:
    @intrinsic
    def load(typing_context: Any, address: Any, index: Any) -> Any:
        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            kind = ir.VectorType(stored, lanes) if lanes else stored
            element = b.gep(b.inttoptr(args[0], stored.as_pointer()), [args[1]])
            return convert(b, b.load(b.bitcast(element, kind.as_pointer()), align=_NBYTES[stored]))

        return result(types.int64, types.int64), generate

    return load


def _storer(value_type: Any, stored: Any, convert: Callable[[Any, Any], Any]) -> Any:
    @intrinsic
    def store(typing_context: Any, address: Any, index: Any, value: Any) -> Any:
        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            out = convert(b, args[2])
            element = b.gep(b.inttoptr(args[0], stored.as_pointer()), [args[1]])
            b.store(out, b.bitcast(element, out.type.as_pointer()), align=_NBYTES[stored])
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, value_type), generate

    return store


load_f32 = _loader(F32, _FLOAT, _same, 16)
load_bf16 = _loader(F32, _I16, _widen_bf16, 16)
load_f16 = _loader(F32, _I16, _widen_f16, 16)
load_i8 = _loader(F32, _I8, _widen_i8, 16)
load_u32 = _loader(U32, _I32, _same, 16)
load_pairs = _loader(U32, _I16, _pair_up, 32)
load_zipped = _loader(U32, _I16, _zip, 32)
load_i8_pairs = _loader(U32, _I8, _pair_up_i8, 32)
load_u8 = _loader(U16, _I8, lambda b, v: b.zext(v, ir.VectorType(_I16, 32)), 32)

store_f32 = _storer(F32, _FLOAT, _same)
store_bf16 = _storer(F32, _I16, _narrow_bf16)
store_u16 = _storer(U16, _I16, _same)
store_u32 = _storer(U32, _I32, _same)

get_f32 = _loader(types.float32, _FLOAT, _same, 0)
get_bf16 = _loader(types.float32, _I16, _widen_bf16, 0)
get_f16 = _loader(types.float32, _I16, _widen_f16, 0)
get_i8 = _loader(types.float32, _I8, _widen_i8, 0)
get_u16 = _loader(types.uint32, _I16, lambda b, v: b.zext(v, _I32), 0)
get_u8 = _loader(types.uint32, _I8, lambda b, v: b.zext(v, _I32), 0)
get_i32 = _loader(types.int64, _I32, lambda b, v: b.sext(v, _I64), 0)
get_i64 = _loader(types.int64, _I64, _same, 0)

put_f32 = _storer(types.float32, _FLOAT, _same)
put_bf16 = _storer(types.float32, _I16, _narrow_bf16)
put_f16 = _storer(types.float32, _I16, _narrow_f16)
put_u16 = _storer(types.uint32, _I16, lambda b, v: b.trunc(v, _I16))


# Arithmetic. ----------------------------------------------------------------------------------------------------------


def _binary(operation: Any, name: str, vectors: tuple[Vector, ...]) -> None:
    @intrinsic
    def apply(typing_context: Any, left: Any, right: Any) -> Any:
        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            return getattr(b, name)(*args)

        return left(left, left), generate

    @overload(operation, inline="always")
    def choose(left, right):  # type: ignore[no-untyped-def]  # numba compares signatures, annotations included
        if isinstance(left, Vector) and left == right and left in vectors:
            return lambda left, right: apply(left, right)
        return None


for _operation, _float, _integer in (
    (operator.add, "fadd", "add"),
    (operator.sub, "fsub", "sub"),
    (operator.mul, "fmul", "mul"),
):
    _binary(_operation, _float, (F32,))
    _binary(_operation, _integer, (U32, U16))
_binary(operator.truediv, "fdiv", (F32,))
for _operation, _integer in (
    (operator.and_, "and_"),
    (operator.or_, "or_"),
    (operator.lshift, "shl"),
    (operator.rshift, "lshr"),
):
    _binary(_operation, _integer, (U32, U16))


def _call(b: Any, name: str, args: Any) -> Any:
    """One of LLVM's own functions, for F32."""
    kind = ir.FunctionType(F32.llvm, [F32.llvm] * len(args))
    return b.call(cgutils.get_or_insert_function(b.module, kind, f"llvm.{name}.v16f32"), args)


@intrinsic
def fma(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c with one rounding."""
    return F32(F32, F32, F32), lambda context, builder, signature, args: _call(builder, "fma", args)


@intrinsic
def sqrt(typing_context: Any, value: Any) -> Any:
    """Of every lane."""
    return F32(F32), lambda context, builder, signature, args: _call(builder, "sqrt", args)


def _widen_halves(b: Any, pairs: Any) -> Any:
    """The numbers in the lower and in the upper halves of 16 pairs of bf16."""
    low, high = b.shl(pairs, _number(b, pairs, 16)), b.and_(pairs, _number(b, pairs, 0xFFFF0000))
    return b.bitcast(low, F32.llvm), b.bitcast(high, F32.llvm)


@intrinsic
def fma_pairs(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    """c + a * b over both numbers of each pair of bf16: the upper one first, each with one rounding.

    Processors with AVX512-BF16 have an instruction for it, which differs in one respect: it takes numbers below the
    smallest normal float32 for zero.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        left, right, sums = args
        if "+avx512bf16" in context.codegen().magic_tuple()[2]:
            pairs = ir.VectorType(_Bfloat(), 32)
            kind = ir.FunctionType(F32.llvm, [F32.llvm, pairs, pairs])
            function = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")
            return builder.call(function, [sums, builder.bitcast(left, pairs), builder.bitcast(right, pairs)])
        for one, other in reversed([*zip(_widen_halves(builder, left), _widen_halves(builder, right), strict=True)]):
            sums = _call(builder, "fma", [one, other, sums])
        return sums

    return F32(U32, U32, F32), generate


@intrinsic
def as_f32(typing_context: Any, bits: Any) -> Any:
    """The same bits as float32."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.bitcast(args[0], F32.llvm)

    return F32(U32), generate


def _splatter(result: Vector, given: Any) -> Any:
    @intrinsic
    def splat(typing_context: Any, value: Any) -> Any:
        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            value = args[0] if args[0].type == result.kind else b.trunc(args[0], result.kind)
            return _splat(b, value, result.lanes)

        return result(given), generate

    return splat


splat_f32 = _splatter(F32, types.float32)
splat_u32 = _splatter(U32, types.uint32)
splat_u16 = _splatter(U16, types.uint32)


@intrinsic
def total(typing_context: Any, value: Any) -> Any:
    """The sum of all lanes, as a balanced tree."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        value, size = args[0], LANES
        while size > 1:
            size //= 2
            halves = (list(range(size)), list(range(size, 2 * size)))
            low, high = (
                b.shuffle_vector(value, value, ir.Constant(ir.VectorType(_I32, size), lanes)) for lanes in halves
            )
            value = b.fadd(low, high)
        return b.extract_element(value, _I32(0))

    return types.float32(F32), generate


@intrinsic
def claim(typing_context: Any, address: Any) -> Any:
    """Adds one to the int64 at `address`, atomically, and gives what it was."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.atomic_rmw("add", b.inttoptr(args[0], _I64.as_pointer()), _I64(1), "monotonic")

    return types.int64(types.int64), generate


# Whole numbers to memory and back to bits: for packers. ---------------------------------------------------------------

load_u16 = _loader(U16, _I16, _same, 32)
store_u32 = _storer(U32, _I32, _same)
store_u32_low = _storer(U32, _I8, lambda b, v: b.trunc(v, ir.VectorType(_I8, 16)))
store_u16_low = _storer(U16, _I8, lambda b, v: b.trunc(v, ir.VectorType(_I8, 32)))
put_u8 = _storer(types.uint32, _I8, lambda b, v: b.trunc(v, _I8))
put_i32 = _storer(types.int64, _I32, lambda b, v: b.trunc(v, _I32))


@intrinsic
def as_u32(typing_context: Any, value: Any) -> Any:
    """The same bits as whole numbers."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.bitcast(args[0], U32.llvm)

    return U32(F32), generate


@intrinsic
def through_f16(typing_context: Any, value: Any) -> Any:
    """Of every lane: the nearest float16."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return _widen_f16(b, _narrow_f16(b, args[0]))

    return F32(F32), generate


@intrinsic
def prefetch(typing_context: Any, address: Any) -> Any:
    """Asks for the cache line at `address`, which need not be anyone's."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32])
        line = b.inttoptr(args[0], _I8.as_pointer())
        b.call(cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0"), [line, _I32(0), _I32(3), _I32(1)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def through_bf16(typing_context: Any, value: Any) -> Any:
    """Of every lane: the nearest bfloat16."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return _widen_bf16(b, _narrow_bf16(b, args[0]))

    return F32(F32), generate
