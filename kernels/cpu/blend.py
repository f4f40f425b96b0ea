"""Choosing, comparing and converting the lanes of vectors, and hints to the caches."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from offload.kernels.cpu.vector import (
    _I8,
    _I16,
    _I32,
    F32,
    LANES,
    U32,
    _number,
)


def _unary(result: Any, operand: Any, make: Any) -> Any:
    """An intrinsic of one vector; `make` gets the builder and the value."""

    @intrinsic
    def apply(typing_context: Any, value: Any) -> Any:
        return result(operand), lambda context, b, signature, args: make(b, args[0])

    return apply


def _count_leading_zeros(b: Any, value: Any) -> Any:
    kind = ir.FunctionType(U32.llvm, [U32.llvm, ir.IntType(1)])
    function = cgutils.get_or_insert_function(b.module, kind, "llvm.ctlz.v16i32")
    return b.call(function, [value, ir.IntType(1)(0)])


def _absolute(b: Any, value: Any) -> Any:
    kind = ir.FunctionType(U32.llvm, [U32.llvm, ir.IntType(1)])
    function = cgutils.get_or_insert_function(b.module, kind, "llvm.abs.v16i32")
    return b.call(function, [value, ir.IntType(1)(0)])


def _magnitude(b: Any, value: Any) -> Any:
    return b.bitcast(b.and_(b.bitcast(value, U32.llvm), _number(b, ir.Constant(U32.llvm, None), 0x7FFFFFFF)), F32.llvm)


magnitude = _unary(F32, F32, _magnitude)  # without its sign
absolute = _unary(U32, U32, _absolute)  # of signed integers
leading_zeros = _unary(U32, U32, _count_leading_zeros)  # 32 for 0
bits_of = _unary(U32, F32, lambda b, v: b.bitcast(v, U32.llvm))
to_f32 = _unary(F32, U32, lambda b, v: b.sitofp(v, F32.llvm))  # of signed integers
to_i32 = _unary(U32, F32, lambda b, v: b.fptosi(v, U32.llvm))  # towards zero


@intrinsic
def larger(typing_context: Any, a: Any, b: Any) -> Any:
    """Of every lane the larger; b where a is NaN."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.select(b.fcmp_ordered(">", *args), *args)

    return F32(F32, F32), generate


@intrinsic
def smaller(typing_context: Any, a: Any, b: Any) -> Any:
    """Of every lane the smaller; b where a is NaN."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.select(b.fcmp_ordered("<", *args), *args)

    return F32(F32, F32), generate


@intrinsic
def pick(typing_context: Any, table: Any, index: Any) -> Any:
    """Of a table of 16 float32 or integers, the entry that the lowest four bits of each lane of `index` name."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        entries, which = b.bitcast(args[0], U32.llvm), args[1]
        if "+avx512f" in context.codegen().magic_tuple()[2]:  # one instruction, that looks at four bits only
            kind = ir.FunctionType(U32.llvm, [U32.llvm, U32.llvm])
            permute = cgutils.get_or_insert_function(b.module, kind, "llvm.x86.avx512.permvar.si.512")
            return b.bitcast(b.call(permute, [entries, which]), args[0].type)
        which = b.and_(which, _number(b, which, LANES - 1))
        out = ir.Constant(U32.llvm, ir.Undefined)
        for lane in range(LANES):
            entry = b.extract_element(entries, b.extract_element(which, _I32(lane)))
            out = b.insert_element(out, entry, _I32(lane))
        return b.bitcast(out, args[0].type)

    return table(table, U32), generate


@intrinsic
def largest(typing_context: Any, value: Any) -> Any:
    """The largest of all lanes, none of which is NaN."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        value, size = args[0], LANES
        while size > 1:
            size //= 2
            halves = (list(range(size)), list(range(size, 2 * size)))
            low, high = (
                b.shuffle_vector(value, value, ir.Constant(ir.VectorType(_I32, size), lanes)) for lanes in halves
            )
            value = b.select(b.fcmp_ordered(">", low, high), low, high)
        return b.extract_element(value, _I32(0))

    return types.float32(F32), generate


# Memory. --------------------------------------------------------------------------------------------------------------


@intrinsic
def load_codes(typing_context: Any, address: Any, index: Any) -> Any:
    """16 bytes as U32."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        kind = ir.VectorType(_I8, LANES)
        element = b.gep(b.inttoptr(args[0], _I8.as_pointer()), [args[1]])
        return b.zext(b.load(b.bitcast(element, kind.as_pointer()), align=1), U32.llvm)

    return U32(types.int64, types.int64), generate


@intrinsic
def store_signed_codes(typing_context: Any, address: Any, index: Any, value: Any) -> Any:
    """127 less each lane, where -128 stands for all smaller ones and 127 for all larger ones, in a byte."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        value = args[2]
        for sign, bound in (("<", 127), (">", -128)):
            limit = _number(b, value, bound)
            value = b.select(b.icmp_signed(sign, value, limit), value, limit)
        out = b.trunc(value, ir.VectorType(_I8, LANES))
        out = b.xor(out, _number(b, out, 127))
        element = b.gep(b.inttoptr(args[0], _I8.as_pointer()), [args[1]])
        b.store(out, b.bitcast(element, out.type.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, U32), generate


@intrinsic
def store_codes(typing_context: Any, address: Any, index: Any, value: Any) -> Any:
    """The lowest byte of each lane."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        out = b.trunc(args[2], ir.VectorType(_I8, LANES))
        element = b.gep(b.inttoptr(args[0], _I8.as_pointer()), [args[1]])
        b.store(out, b.bitcast(element, out.type.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, U32), generate


def _narrow_pair(b: Any, low: Any, high: Any) -> Any:
    """32 floats to bf16, the same bits as one by one, with half the work."""
    words = ir.VectorType(_I16, 2 * LANES)
    halves = [b.bitcast(one, words) for one in (low, high)]
    rest, kept = (
        b.shuffle_vector(*halves, ir.Constant(ir.VectorType(_I32, 2 * LANES), list(range(first, 4 * LANES, 2))))
        for first in (0, 1)
    )
    half = b.sub(_number(b, kept, 0x8000), b.and_(kept, _number(b, kept, 1)))  # a tie goes up from an odd number
    rounded = b.add(kept, b.zext(b.icmp_unsigned(">", rest, half), words))
    order = ir.Constant(ir.VectorType(_I32, 2 * LANES), list(range(2 * LANES)))
    is_nan = b.shuffle_vector(*(b.fcmp_unordered("uno", one, one) for one in (low, high)), order)
    return b.select(is_nan, _number(b, kept, 0x7FC0), rounded)


@intrinsic
def stream_bf16(typing_context: Any, address: Any, index: Any, low: Any, high: Any) -> Any:
    """Stores 32 bf16, past the caches: a whole line of memory, which must begin at a multiple of 64 bytes.

    Nothing is fetched first. Such stores become visible in any order, until the thread's next atomic operation.
    """

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        line = _narrow_pair(b, *args[2:])
        element = b.gep(b.inttoptr(args[0], _I16.as_pointer()), [args[1]])
        made = b.store(line, b.bitcast(element, line.type.as_pointer()), align=64)
        made.set_metadata("nontemporal", b.module.add_metadata([_I32(1)]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, F32, F32), generate


@intrinsic
def stream_f32(typing_context: Any, address: Any, index: Any, value: Any) -> Any:
    """Stores a whole line of memory past the caches, as stream_bf16."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        element = b.gep(b.inttoptr(args[0], ir.FloatType().as_pointer()), [args[1]])
        made = b.store(args[2], b.bitcast(element, F32.llvm.as_pointer()), align=64)
        made.set_metadata("nontemporal", b.module.add_metadata([_I32(1)]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, F32), generate


@intrinsic
def prefetch(typing_context: Any, address: Any) -> Any:
    """Asks for the line at `address`, which need not exist."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0")
        b.call(function, [b.inttoptr(args[0], _I8.as_pointer()), _I32(0), _I32(3), _I32(1)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic(prefer_literal=True)
def scratch(typing_context: Any, nbytes: Any) -> Any:
    """The address of `nbytes` (a constant) on the caller's stack, on a line of its own."""
    size = nbytes.literal_value

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        place = cgutils.alloca_once(b, ir.ArrayType(_I8, size))
        place.align = 64
        return b.ptrtoint(place, ir.IntType(64))

    return types.int64(nbytes), generate
