"""SIMD vectors for numba: kernels say which lanes they mean instead of hoping for a vectoriser.

A vector has 64 bytes: F32 (16 float32), U32 (16 of 32 bits) or U16 (32 of 16 bits). LLVM splits it where registers are
shorter. Nothing is reordered, so the same numbers give the same bits in every kernel that sums by the same steps.

Here are the types and what is computed lane by lane. `memory` loads and stores them, `convert` makes one kind of number
out of another, and `lanes` compares, moves and sums lanes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models, register_default
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin

LANES = 16  # of F32 and U32

I1, I8, I16, I32, I64, FLOAT = (*map(ir.IntType, (1, 8, 16, 32, 64)), ir.FloatType())


class Vector(types.Type):  # type: ignore[misc]
    """Numba's type of a vector of `lanes` elements of an LLVM type."""

    def __init__(self, name: str, kind: Any, lanes: int) -> None:
        self.kind, self.lanes = kind, lanes
        super().__init__(name=name)

    @property
    def llvm(self) -> Any:
        return ir.VectorType(self.kind, self.lanes)


F32, U32, U16 = Vector("F32", FLOAT, 16), Vector("U32", I32, 16), Vector("U16", I16, 32)
WIDE_F32, WIDE_U32 = Vector("WIDE_F32", FLOAT, 64), Vector("WIDE_U32", I32, 64)  # four registers: see `wide`
WIDE_U16 = Vector("WIDE_U16", I16, 64)


class Bfloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not have."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bfloat)

    def __hash__(self) -> int:
        return hash(Bfloat)


@register_default(Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, vector.llvm)


# For those who build LLVM's instructions. -----------------------------------------------------------------------------


def number(like: Any, value: int) -> Any:
    """A constant of the type of `like`, a value or a vector."""
    count = like.type.count if isinstance(like.type, ir.VectorType) else 0
    return ir.Constant(like.type, [value] * count if count else value)


def order(lanes: list[int]) -> Any:
    """Which lanes a shuffle takes."""
    return ir.Constant(ir.VectorType(I32, len(lanes)), lanes)


def call(b: Any, name: str, result: Any, args: Any) -> Any:
    """A call of one of LLVM's own functions."""
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return b.call(cgutils.get_or_insert_function(b.module, kind, f"llvm.{name}"), args)


def unary(result: Any, operand: Any, make: Callable[[Any, Any], Any]) -> Any:
    """An intrinsic of one value; `make` gets the builder and the value."""

    @intrinsic
    def apply(typing_context: Any, value: Any) -> Any:
        return result(operand), lambda context, b, signature, args: make(b, args[0])

    return apply


# Arithmetic. ----------------------------------------------------------------------------------------------------------


def _operator(operation: Any, names: dict[Vector, str]) -> None:
    """`operation` of two vectors of a kind is LLVM's instruction of that name.

    Registered as numba registers its own, which compiles several times as fast as an overload that is inlined.
    """

    @infer_global(operation)
    class Typing(AbstractTemplate):  # type: ignore[misc]
        def generic(self, args: Any, kws: Any) -> Any:
            if len(args) == 2 and args[0] == args[1] and args[0] in names:
                return signature(args[0], *args)
            return None

    for vector, name in names.items():

        @lower_builtin(operation, vector, vector)
        def lower(context: Any, b: Any, signature: Any, args: Any, name: str = name) -> Any:
            return getattr(b, name)(*args)


for _operation, _float, _integer in (
    (operator.add, "fadd", "add"),
    (operator.sub, "fsub", "sub"),
    (operator.mul, "fmul", "mul"),
):
    _operator(_operation, {F32: _float, U32: _integer, U16: _integer, WIDE_F32: _float, WIDE_U32: _integer})
_operator(operator.truediv, {F32: "fdiv"})
for _operation, _integer in (
    (operator.and_, "and_"),
    (operator.or_, "or_"),
    (operator.xor, "xor"),
    (operator.lshift, "shl"),
    (operator.rshift, "lshr"),
):
    _operator(_operation, {U32: _integer, U16: _integer, WIDE_U32: _integer})


@intrinsic
def fma(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c with one rounding."""
    return F32(F32, F32, F32), lambda context, b, signature, args: call(b, "fma.v16f32", F32.llvm, args)


sqrt = unary(F32, F32, lambda b, v: call(b, "sqrt.v16f32", F32.llvm, [v]))
absolute = unary(U32, U32, lambda b, v: call(b, "abs.v16i32", U32.llvm, [v, I1(0)]))  # of signed integers
leading_zeros = unary(U32, U32, lambda b, v: call(b, "ctlz.v16i32", U32.llvm, [v, I1(0)]))  # 32 for 0
magnitude = unary(F32, F32, lambda b, v: call(b, "fabs.v16f32", F32.llvm, [v]))  # without its sign


def _widen_halves(b: Any, pairs: Any) -> Any:
    """The numbers in the lower and in the upper halves of 16 pairs of bf16."""
    low, high = b.shl(pairs, number(pairs, 16)), b.and_(pairs, number(pairs, 0xFFFF0000))
    return b.bitcast(low, F32.llvm), b.bitcast(high, F32.llvm)


@intrinsic
def fma_pairs(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    """c + a * b over both numbers of each pair of bf16: the upper one first, each with one rounding.

    Processors with AVX512-BF16 have an instruction for it, which differs in one respect: it takes numbers below the
    smallest normal float32 for zero.
    """

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        left, right, sums = args
        if "+avx512bf16" in context.codegen().magic_tuple()[2]:
            pairs = ir.VectorType(Bfloat(), 32)
            return call(
                b, "x86.avx512bf16.dpbf16ps.512", F32.llvm, [sums, b.bitcast(left, pairs), b.bitcast(right, pairs)]
            )
        for one, other in reversed([*zip(_widen_halves(b, left), _widen_halves(b, right), strict=True)]):
            sums = call(b, "fma.v16f32", F32.llvm, [one, other, sums])
        return sums

    return F32(U32, U32, F32), generate


def _splatter(result: Vector, given: Any) -> Any:
    def splat(b: Any, value: Any) -> Any:
        undefined = ir.Constant(result.llvm, ir.Undefined)
        narrow = value if value.type == result.kind else b.trunc(value, result.kind)
        first = b.insert_element(undefined, narrow, I32(0))
        return b.shuffle_vector(first, undefined, order([0] * result.lanes))

    return unary(result, given, splat)


splat_f32 = _splatter(F32, types.float32)
splat_u32 = _splatter(U32, types.uint32)
splat_u16 = _splatter(U16, types.uint32)
wide_f32 = _splatter(WIDE_F32, types.float32)
wide_u32 = _splatter(WIDE_U32, types.uint32)
