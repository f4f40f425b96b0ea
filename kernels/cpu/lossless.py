"""Rows of bf16 out of 12 bits a weight, 64 weights at a time, in registers: two vectors of 32 bf16.

Rare exponents are patches, in the order of inputs. A row goes in runs of whole blocks without one, and single blocks in
which lanes are replaced. Patches come from a file: a damaged one gives wrong numbers, and reaches no other memory.
"""

from __future__ import annotations

from typing import Any

from numba import int64, uint32

from offload.kernels.cpu.ahead import ask
from offload.kernels.cpu.helper import helper
from offload.kernels.cpu.lanes import lane_numbers_u16, where_equal
from offload.kernels.cpu.memory import get_i32, get_u8, load_u16_low
from offload.kernels.cpu.vector import splat_u16


@helper(inline=True)
def _join(low: Any, code: Any, largest: Any) -> Any:
    """Sign and mantissa, exponent codes where a bf16 has its exponent, and the largest one there, to 32 bf16."""
    sign = low << splat_u16(uint32(8))
    return (low | sign) & splat_u16(uint32(0x807F)) | (largest - code)


@helper(inline=True)
def block_at(low: int, codes: int, largest: Any, k: int) -> Any:
    """Weights k to k + 63 of a row, as if none had a patch.

    Args:
        low, codes: addresses of the row's two planes.
        largest: the matrix's largest exponent, where a bf16 has it, in every lane.
    """
    ask(low + k, 64)
    if k & 64:
        ask(codes + (k >> 1) - 32, 64)
    mask, pair = splat_u16(uint32(0x780)), load_u16_low(codes, k >> 1)
    one = _join(load_u16_low(low, k), pair << splat_u16(uint32(7)) & mask, largest)
    return one, _join(load_u16_low(low, k + 32), pair << splat_u16(uint32(3)) & mask, largest)


@helper(inline=True)
def clean_until(at: int, patch: int, last: int, k: int, whole: int) -> int:
    """Where the run of blocks from k on ends that are whole and have none of the patches `patch` to `last`."""
    return whole if patch >= last else min(whole, max(int64(k), int64(get_i32(at, patch) // 64 * 64)))


@helper
def patched(one: Any, two: Any, at: int, exponents: int, patch: int, last: int, k: int) -> Any:
    """Weights k to k + 63 with their patches, and which patch is next."""
    lanes, kept = lane_numbers_u16(), splat_u16(uint32(0x807F))
    while patch < last:
        lane = int64(get_i32(at, patch)) - k
        if lane >= 64:
            break
        exponent = splat_u16(uint32(get_u8(exponents, patch) << uint32(7)))
        if lane >= 0:
            one = where_equal(lanes, splat_u16(uint32(lane)), one & kept | exponent, one)
            two = where_equal(lanes, splat_u16(uint32(lane + 65504)), two & kept | exponent, two)  # less 32
        patch += 1
    return one, two, patch
