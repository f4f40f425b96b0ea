"""Comparisons of vectors: lane by lane, and across the lanes of one."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from offload.kernels.cpu.vector import F32, LANES, U32

_I32, _I64 = ir.IntType(32), ir.IntType(64)


def _compare(b: Any, sign: str, vector: Any, left: Any, right: Any) -> Any:
    """A mask of one bit for each lane; whole numbers are unsigned."""
    return b.fcmp_ordered(sign, left, right) if vector == F32 else b.icmp_unsigned(sign, left, right)


def _butterfly(b: Any, v: Any, width: int, join: Any) -> Any:
    """Every lane becomes what `join` makes of the `width` lanes of its run."""
    count = v.type.count
    apart = width // 2
    while apart:
        others = ir.Constant(ir.VectorType(_I32, count), [lane ^ apart for lane in range(count)])
        v = join(v, b.shuffle_vector(v, v, others))
        apart //= 2
    return v


def _extreme(sign: str) -> tuple[Any, Any, Any]:
    """Three intrinsics: of two vectors, lane by lane; of all lanes of one; and of each run of four lanes."""

    def chooser(b: Any, vector: Any) -> Any:
        return lambda left, right: b.select(_compare(b, sign, vector, left, right), left, right)

    @intrinsic
    def of_two(typing_context: Any, left: Any, right: Any) -> Any:
        return left(left, left), lambda context, b, signature, args: chooser(b, left)(*args)

    @intrinsic
    def of_all(typing_context: Any, value: Any) -> Any:
        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            return _butterfly(b, args[0], value.lanes, chooser(b, value))

        return value(value), generate

    @intrinsic
    def of_four(typing_context: Any, value: Any) -> Any:
        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            return _butterfly(b, args[0], 4, chooser(b, value))

        return value(value), generate

    return of_two, of_all, of_four


smaller, smallest, _ = _extreme("<")
larger, largest, largest_of_4 = _extreme(">")


@intrinsic
def total_of_4(typing_context: Any, value: Any) -> Any:
    """Each run of four lanes: its sum, in all four."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return _butterfly(b, args[0], 4, b.fadd)

    return F32(F32), generate


def _where(sign: str) -> Any:
    @intrinsic
    def where(typing_context: Any, left: Any, right: Any, yes: Any, no: Any) -> Any:
        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            return b.select(_compare(b, sign, left, args[0], args[1]), args[2], args[3])

        return yes(left, left, yes, yes), generate

    return where


where_equal = _where("==")  # (left, right, yes, no): a lane of `yes` where left equals right, else of `no`
where_less = _where("<")


@intrinsic
def equal(typing_context: Any, left: Any, right: Any) -> Any:
    """Which lanes are equal: an int64 with a bit for each."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        mask = _compare(b, "==", left, *args)
        return b.zext(b.bitcast(mask, ir.IntType(left.lanes)), _I64)

    return types.int64(left, left), generate


@intrinsic
def count_bits(typing_context: Any, bits: Any) -> Any:
    """How many bits of an int64 are set."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.ctpop(args[0])

    return types.int64(types.int64), generate


@intrinsic
def lowest_bit(typing_context: Any, bits: Any) -> Any:
    """The place of the lowest bit that is set; there must be one."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.int64), generate


@intrinsic
def first(typing_context: Any, value: Any) -> Any:
    """The number in the first lane."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.extract_element(args[0], _I32(0))

    return (types.float32 if value == F32 else types.uint32)(value), generate


@intrinsic
def lane_numbers(typing_context: Any) -> Any:
    """0 to 15, a lane each."""
    return U32(), lambda context, b, signature, args: ir.Constant(U32.llvm, list(range(LANES)))


# Vectors from vectors. ------------------------------------------------------------------------------------------------


def _shuffler(lanes: list[int]) -> Any:
    @intrinsic
    def shuffle(typing_context: Any, left: Any, right: Any) -> Any:
        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            return b.shuffle_vector(*args, ir.Constant(ir.VectorType(_I32, LANES), lanes))

        return F32(F32, F32), generate

    return shuffle


evens = _shuffler(list(range(0, 32, 2)))  # of two vectors in a row, the numbers at even places
odds = _shuffler(list(range(1, 32, 2)))
zip_low = _shuffler([lane // 2 + 16 * (lane % 2) for lane in range(16)])  # back: the first of two, and the second
zip_high = _shuffler([8 + lane // 2 + 16 * (lane % 2) for lane in range(16)])


@intrinsic
def totals(typing_context: Any, vectors: Any) -> Any:
    """16 vectors to one: lane i is the sum of the lanes of vector i, as a balanced tree."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        left, apart = cgutils.unpack_tuple(b, args[0], LANES), LANES // 2
        while apart:  # the first half of the vectors goes to lanes whose bit `apart` is 0, the other half to the others
            keep = [lane if lane & apart == 0 else lane - apart + LANES for lane in range(LANES)]
            move = [lane + apart if lane & apart == 0 else lane + LANES for lane in range(LANES)]
            near, far = (ir.Constant(ir.VectorType(_I32, LANES), lanes) for lanes in (keep, move))
            left = [
                b.fadd(b.shuffle_vector(one, other, near), b.shuffle_vector(one, other, far))
                for one, other in zip(left[:apart], left[apart:], strict=True)
            ]
            apart //= 2
        return left[0]

    return F32(types.UniTuple(F32, LANES)), generate
