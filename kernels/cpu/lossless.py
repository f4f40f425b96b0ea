"""One row of a bf16 matrix out of 12 bits a weight: 64 weights at a time, then the rare exponents as patches."""

from __future__ import annotations

from typing import Any

from numba import int64, uint32

from offload.kernels.cpu.ahead import ask
from offload.kernels.cpu.helper import helper
from offload.kernels.cpu.memory import get_i32, get_u8, get_u16, load_u16_low, put_u16, store_u16
from offload.kernels.cpu.vector import splat_u16


@helper
def _join(low: Any, code: Any, largest: Any) -> Any:
    """Sign and mantissa, exponent codes and the largest exponent to the bits of 32 bf16."""
    exponent = (largest - code) << splat_u16(uint32(7))
    sign = low << splat_u16(uint32(8)) & splat_u16(uint32(0x8000))
    return sign | exponent | low & splat_u16(uint32(0x7F))


@helper
def unpack_row(  # type: ignore[no-untyped-def]
    low: int, codes: int, largest: int, at: int, exponents: int, patches: int, first: int, last: int, out: int, n: int
):  # fmt: skip
    """Writes `n` bf16 to the address `out`.

    Args:
        low, codes: addresses of the row's two planes.
        largest: the matrix's largest exponent.
        at, exponents: addresses of all `patches`; the row's are `first` to `last`. These come from a file, and a
            damaged one must not reach other memory.
    """
    top, four = splat_u16(uint32(largest)), splat_u16(uint32(4))
    whole = n // 64 * 64
    for start in range(0, whole, 64):
        ask(low + start, 64)
        ask(codes + (start >> 1), 64)
        pair = load_u16_low(codes, start >> 1)
        store_u16(out, start, _join(load_u16_low(low, start), pair & splat_u16(uint32(15)), top))
        store_u16(out, start + 32, _join(load_u16_low(low, start + 32), pair >> four, top))
    for k in range(whole, n):
        byte = get_u8(codes, (whole >> 1) + (k - whole) % 32)
        code = byte & uint32(15) if k - whole < 32 else byte >> uint32(4)
        one = get_u8(low, k)
        put_u16(out, k, (one & uint32(0x80)) << uint32(8) | (uint32(largest) - code) << uint32(7) | one & uint32(0x7F))
    for p in range(max(first, int64(0)), min(last, patches)):
        k = get_i32(at, p)
        if k < 0 or k >= n:
            continue
        put_u16(out, k, get_u16(out, k) & uint32(0x807F) | get_u8(exponents, p) << uint32(7))
