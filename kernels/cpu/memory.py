"""Raw memory: vectors and single numbers from addresses and back.

Addresses are plain integers, as `Tensor.data_ptr()` gives them, and an index counts elements. There are no bounds and
no ownership here: the wrappers that hand an address out check shapes first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from offload.kernels.cpu.convert import (
    narrow_bf16,
    narrow_bf16_pair,
    narrow_f16,
    pair_up,
    pair_up_i8,
    widen_bf16,
    widen_f16,
    widen_i8,
    zip_halves,
)
from offload.kernels.cpu.vector import (
    F32,
    FLOAT,
    I8,
    I16,
    I32,
    I64,
    LANES,
    U16,
    U32,
    WIDE_F32,
    WIDE_U16,
    Vector,
    number,
)

_NBYTES = {I8: 1, I16: 2, I32: 4, I64: 8, FLOAT: 4}


def _place(b: Any, kind: Any, args: Any) -> Any:
    """The pointer to an element, of an address and an index."""
    return b.gep(b.inttoptr(args[0], kind.as_pointer()), [args[1]])


def _same(b: Any, value: Any) -> Any:
    return value


def _widener(kind: Any) -> Callable[[Any, Any], Any]:
    """Whole numbers without a sign to more bits."""
    return lambda b, v: b.zext(v, kind)


def _cutter(kind: Any) -> Callable[[Any, Any], Any]:
    """The lowest bits of whole numbers."""
    return lambda b, v: b.trunc(v, kind)


def _loader(result: Any, stored: Any, convert: Callable[[Any, Any], Any], lanes: int) -> Any:
    @intrinsic
    def load(typing_context: Any, address: Any, index: Any) -> Any:
        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            kind = ir.VectorType(stored, lanes) if lanes else stored
            element = b.bitcast(_place(b, stored, args), kind.as_pointer())
            return convert(b, b.load(element, align=_NBYTES[stored]))

        return result(types.int64, types.int64), generate

    return load


def _storer(value_type: Any, stored: Any, convert: Callable[[Any, Any], Any]) -> Any:
    @intrinsic
    def store(typing_context: Any, address: Any, index: Any, value: Any) -> Any:
        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            out = convert(b, args[2])
            b.store(out, b.bitcast(_place(b, stored, args), out.type.as_pointer()), align=_NBYTES[stored])
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, value_type), generate

    return store


# Vectors. -------------------------------------------------------------------------------------------------------------

load_f32 = _loader(F32, FLOAT, _same, 16)
load_bf16 = _loader(F32, I16, widen_bf16, 16)
load_wide_f32 = _loader(WIDE_F32, FLOAT, _same, 64)
load_wide_bf16 = _loader(WIDE_F32, I16, widen_bf16, 64)
load_f16 = _loader(F32, I16, widen_f16, 16)
load_i8 = _loader(F32, I8, widen_i8, 16)
load_u32 = _loader(U32, I32, _same, 16)
load_u32_low = _loader(U32, I8, _widener(U32.llvm), 16)  # of bytes
load_u16 = _loader(U16, I16, _same, 32)
load_u16_low = _loader(U16, I8, _widener(U16.llvm), 32)  # of bytes
load_pairs = _loader(U32, I16, pair_up, 32)
load_zipped = _loader(U32, I16, zip_halves, 32)
load_i8_pairs = _loader(U32, I8, pair_up_i8, 32)

store_f32 = _storer(F32, FLOAT, _same)
store_bf16 = _storer(F32, I16, narrow_bf16)
store_wide_f32 = _storer(WIDE_F32, FLOAT, _same)
store_wide_u16 = _storer(WIDE_U16, I16, _same)
store_u32 = _storer(U32, I32, _same)
store_u32_low = _storer(U32, I8, _cutter(ir.VectorType(I8, 16)))  # as bytes
store_u16 = _storer(U16, I16, _same)
store_u16_low = _storer(U16, I8, _cutter(ir.VectorType(I8, 32)))  # as bytes


def _inverted_bytes(b: Any, value: Any) -> Any:
    for sign, bound in (("<", 127), (">", -128)):
        limit = number(value, bound)
        value = b.select(b.icmp_signed(sign, value, limit), value, limit)
    out = b.trunc(value, ir.VectorType(I8, LANES))
    return b.xor(out, number(out, 127))


store_signed_codes = _storer(U32, I8, _inverted_bytes)
"""127 less each lane, where -128 stands for all smaller ones and 127 for all larger ones, in a byte."""


def _streamer(value_types: tuple[Vector, ...], stored: Any, convert: Callable[..., Any]) -> Any:
    """Stores a whole line of memory, which begins at a multiple of 64 bytes, past the caches: nothing is fetched first.

    Such stores become visible in any order, until the thread's next atomic operation.
    """

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        line = convert(b, *args[2:])
        made = b.store(line, b.bitcast(_place(b, stored, args), line.type.as_pointer()), align=64)
        made.set_metadata("nontemporal", b.module.add_metadata([I32(1)]))
        return context.get_dummy_value()

    @intrinsic
    def stream(typing_context: Any, address: Any, index: Any, value: Any) -> Any:
        return types.void(types.int64, types.int64, *value_types), generate

    @intrinsic
    def stream_pair(typing_context: Any, address: Any, index: Any, low: Any, high: Any) -> Any:
        return types.void(types.int64, types.int64, *value_types), generate

    return stream if len(value_types) == 1 else stream_pair


stream_bf16 = _streamer((F32, F32), I16, narrow_bf16_pair)  # of two vectors, 32 numbers
stream_wide_f32 = _streamer((WIDE_F32,), FLOAT, _same)  # of 64 numbers
stream_wide_u16 = _streamer((WIDE_U16,), I16, _same)
stream_u16 = _streamer((U16,), I16, _same)

# Single numbers. ------------------------------------------------------------------------------------------------------

get_f32 = _loader(types.float32, FLOAT, _same, 0)
get_bf16 = _loader(types.float32, I16, widen_bf16, 0)
get_f16 = _loader(types.float32, I16, widen_f16, 0)
get_i8 = _loader(types.float32, I8, widen_i8, 0)
get_u16 = _loader(types.uint32, I16, _widener(I32), 0)
get_u8 = _loader(types.uint32, I8, _widener(I32), 0)
get_u32 = _loader(types.uint32, I32, _same, 0)
get_i32 = _loader(types.int64, I32, lambda b, v: b.sext(v, I64), 0)
get_i64 = _loader(types.int64, I64, _same, 0)

put_f32 = _storer(types.float32, FLOAT, _same)
put_bf16 = _storer(types.float32, I16, narrow_bf16)
put_f16 = _storer(types.float32, I16, narrow_f16)
put_u16 = _storer(types.uint32, I16, _cutter(I16))
put_u8 = _storer(types.uint32, I8, _cutter(I8))
put_i32 = _storer(types.int64, I32, _cutter(I32))


# Beside loads and stores. ---------------------------------------------------------------------------------------------


@intrinsic
def prefetch(typing_context: Any, address: Any) -> Any:
    """Asks for the cache line at `address`, which need not exist."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
        function = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0")
        b.call(function, [b.inttoptr(args[0], I8.as_pointer()), I32(0), I32(3), I32(1)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def claim(typing_context: Any, address: Any) -> Any:
    """Adds one to the int64 at `address`, atomically, and gives what it was."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.atomic_rmw("add", b.inttoptr(args[0], I64.as_pointer()), I64(1), "monotonic")

    return types.int64(types.int64), generate


@intrinsic(prefer_literal=True)
def scratch(typing_context: Any, nbytes: Any) -> Any:
    """The address of `nbytes` (a constant) on the caller's stack, on a line of its own."""
    size = nbytes.literal_value

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        place = cgutils.alloca_once(b, ir.ArrayType(I8, size))
        place.align = 64
        return b.ptrtoint(place, I64)

    return types.int64(nbytes), generate
