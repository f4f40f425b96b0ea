"""The lanes of vectors: compared and chosen one by one, moved, and taken together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from offload.kernels.cpu.vector import F32, I1, I32, I64, LANES, U16, U32, Vector, call, number, order, unary

# Comparing. -----------------------------------------------------------------------------------------------------------


def _compare(b: Any, sign: str, vector: Any, left: Any, right: Any) -> Any:
    """A mask of one bit for each lane; whole numbers are unsigned."""
    return b.fcmp_ordered(sign, left, right) if vector == F32 else b.icmp_unsigned(sign, left, right)


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
        return b.zext(b.bitcast(mask, ir.IntType(left.lanes)), I64)

    return types.int64(left, left), generate


count_bits = unary(types.int64, types.int64, lambda b, v: b.ctpop(v))
lowest_bit = unary(types.int64, types.int64, lambda b, v: b.cttz(v, I1(1)))  # its place; there must be one

# Moving. --------------------------------------------------------------------------------------------------------------


@intrinsic
def first(typing_context: Any, value: Any) -> Any:
    """The number in the first lane."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.extract_element(args[0], I32(0))

    return (types.float32 if value == F32 else types.uint32)(value), generate


def _lane_numbers(vector: Vector) -> Any:
    @intrinsic
    def numbers(typing_context: Any) -> Any:
        return vector(), lambda context, b, signature, args: ir.Constant(vector.llvm, list(range(vector.lanes)))

    return numbers


lane_numbers = _lane_numbers(U32)  # 0 to 15, a lane each
lane_numbers_u16 = _lane_numbers(U16)  # 0 to 31


def _shuffler(lanes: list[int]) -> Any:
    @intrinsic
    def shuffle(typing_context: Any, left: Any, right: Any) -> Any:
        return F32(F32, F32), lambda context, b, signature, args: b.shuffle_vector(*args, order(lanes))

    return shuffle


evens = _shuffler(list(range(0, 32, 2)))  # of two vectors in a row, the numbers at even places
odds = _shuffler(list(range(1, 32, 2)))
zip_low = _shuffler([lane // 2 + 16 * (lane % 2) for lane in range(16)])  # back: the first of two, and the second
zip_high = _shuffler([8 + lane // 2 + 16 * (lane % 2) for lane in range(16)])


def _pairs_of_rows(b: Any, rows: list[Any], one: list[int], other: list[int]) -> list[Any]:
    """Every two vectors shuffled in two ways."""
    return [
        b.shuffle_vector(x, y, order(by)) for x, y in zip(rows[::2], rows[1::2], strict=True) for by in (one, other)
    ]


def _in_quarters(lanes: list[int]) -> list[int]:
    """Lanes of two vectors (the second from 4 on) within each run of four."""
    return [4 * run + lane % 4 + LANES * (lane // 4) for run in range(4) for lane in lanes]


def _quarters(runs: list[int]) -> list[int]:
    """Runs of four lanes of two vectors (the second from 4 on)."""
    return [4 * run + lane for run in runs for lane in range(4)]


@intrinsic
def transpose(typing_context: Any, rows: Any) -> Any:
    """16 vectors of 16 lanes: lane i of result k is lane k of vector i."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        r = cgutils.unpack_tuple(b, args[0], LANES)
        r = _pairs_of_rows(b, r, _in_quarters([0, 4, 1, 5]), _in_quarters([2, 6, 3, 7]))
        r = [r[4 * i + j] for i in range(4) for j in (0, 2, 1, 3)]
        r = _pairs_of_rows(b, r, _in_quarters([0, 1, 4, 5]), _in_quarters([2, 3, 6, 7]))
        evens_of, odds_of = _quarters([0, 2, 4, 6]), _quarters([1, 3, 5, 7])
        v = [b.shuffle_vector(r[8 * h + j], r[8 * h + 4 + j], order(by)) for h in (0, 1) for by in (evens_of, odds_of)
             for j in range(4)]  # fmt: skip
        out = [b.shuffle_vector(v[4 * odd + j], v[8 + 4 * odd + j], order(by)) for by in (evens_of, odds_of)
               for odd in (0, 1) for j in range(4)]  # fmt: skip
        return context.make_tuple(b, signature.return_type, out)

    return types.UniTuple(U32, LANES)(types.UniTuple(U32, LANES)), generate


@intrinsic
def pick(typing_context: Any, table: Any, index: Any) -> Any:
    """Of a table of 16 float32 or integers, the entry that the lowest four bits of each lane of `index` name."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        entries, which = b.bitcast(args[0], U32.llvm), args[1]
        if "+avx512f" in context.codegen().magic_tuple()[2]:  # one instruction, that looks at four bits only
            out = call(b, "x86.avx512.permvar.si.512", U32.llvm, [entries, which])
            return b.bitcast(out, args[0].type)
        which = b.and_(which, number(which, LANES - 1))
        out = ir.Constant(U32.llvm, ir.Undefined)
        for lane in range(LANES):
            entry = b.extract_element(entries, b.extract_element(which, I32(lane)))
            out = b.insert_element(out, entry, I32(lane))
        return b.bitcast(out, args[0].type)

    return table(table, U32), generate


# Taking together. -----------------------------------------------------------------------------------------------------


def _butterfly(b: Any, v: Any, width: int, join: Callable[[Any, Any], Any]) -> Any:
    """Every lane becomes what `join` makes of the `width` lanes of its run."""
    apart = width // 2
    while apart:
        others = order([lane ^ apart for lane in range(v.type.count)])
        v = join(v, b.shuffle_vector(v, v, others))
        apart //= 2
    return v


def _extreme(sign: str) -> tuple[Any, Any, Any]:
    """Three intrinsics: of two vectors, lane by lane; of all lanes of one; and of each run of four lanes.

    Of two, the second where the first is NaN.
    """

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
total_of_4 = unary(F32, F32, lambda b, v: _butterfly(b, v, 4, b.fadd))  # each run of four lanes: its sum, in all four


def _total(b: Any, value: Any) -> Any:
    size = LANES
    while size > 1:
        size //= 2
        low, high = order(list(range(size))), order(list(range(size, 2 * size)))
        value = b.fadd(b.shuffle_vector(value, value, low), b.shuffle_vector(value, value, high))
    return b.extract_element(value, I32(0))


total = unary(types.float32, F32, _total)  # the sum of all lanes, as a balanced tree


@intrinsic
def totals(typing_context: Any, vectors: Any) -> Any:
    """16 vectors to one: lane i is the sum of the lanes of vector i, as a balanced tree."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        left, apart = cgutils.unpack_tuple(b, args[0], LANES), LANES // 2
        while apart:  # the first half of the vectors goes to lanes whose bit `apart` is 0, the other half to the others
            near = order([lane if lane & apart == 0 else lane - apart + LANES for lane in range(LANES)])
            far = order([lane + apart if lane & apart == 0 else lane + LANES for lane in range(LANES)])
            left = [
                b.fadd(b.shuffle_vector(one, other, near), b.shuffle_vector(one, other, far))
                for one, other in zip(left[:apart], left[apart:], strict=True)
            ]
            apart //= 2
        return left[0]

    return F32(types.UniTuple(F32, LANES)), generate
