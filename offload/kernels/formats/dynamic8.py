"""Optimizer states in 8 bits: 256 values from 0 to 1, denser towards 0, times the largest magnitude of a block.

The dynamic map of Dettmers et al., 8-bit Optimizers via Block-wise Quantization (2022), with the codes of bitsandbytes:
a code is the rank of its value in the sorted map. There are seven decades; the one below 10^(d - 6), d from 0, is cut
into 2^d equal steps for each sign, or 2^(d + 1) where there is no sign, and the middles of the steps are the values.
0 and 1 (not -1) come beside. So a value is linear in its code within a decade, and a float32's exponent nearly tells
the decade: both ways need tables of 16 entries only.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

BLOCK = 256  # values that share a largest magnitude
SMALLEST = 2.0**-29  # is added before encoding: the bits 24 to 27 of float32 then run from 1 to 15 up to 2
LEAST_LARGEST = 2.0**-126  # of a block: its reciprocal is finite
_DECADES = 7
_ZERO = 127  # the code of 0 where there is a sign


@dataclass(frozen=True, eq=False)
class Dynamic8:
    """`n` float32 in 8 bits.

    Attributes:
        codes: uint8 [n].
        largest: float32 [ceil(n / 256)]: the largest magnitude of each block.
        signed: which map: of -1 to 1 (first moments) or of 0 to 1 (second moments).
    """

    codes: torch.Tensor
    largest: torch.Tensor
    signed: bool

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.largest.nbytes

    def blocks_from(self, block: int) -> Dynamic8:
        """A view of all blocks from number `block` on."""
        return Dynamic8(self.codes[block * BLOCK :], self.largest[block:], self.signed)


@dataclass(frozen=True, eq=False)
class Dynamic8Tables:
    """What both directions need; each [16], float32 or int32.

    A rank is |code - 127| with a sign, code + 1 without: a power of two begins a decade. With the leading zeros of
    the rank's 32 bits, modulo 16, as index: value = slope * rank + offset, rounded once.

    The other way, x is the magnitude over the block's largest, plus SMALLEST (rounded once). Its bits without the
    highest four are looked at as a part (four bits) and a place within it (24 bits). No part has more than one change
    of decade, so `carry`, with the part as index, is what to add for a carry into the part from the change on. With the
    new part as index: rank = min(up * x + base, top), rounded once and then towards zero; where there is no sign, it is
    the rank less 1, the code.
    """

    slope: torch.Tensor
    offset: torch.Tensor
    carry: torch.Tensor
    up: torch.Tensor
    base: torch.Tensor
    top: torch.Tensor


@functools.cache
def dynamic8_tables(signed: bool) -> Dynamic8Tables:
    """The map in pieces: zone 0 is the value 0, then the decades, and last the value 1."""
    first = 0 if signed else 1  # log2 of the steps in decade 0
    least = 0 if signed else -1  # what is encoded as 0, as a rank less 1 or not
    decode = torch.zeros(2, 16, dtype=torch.float64)
    zones = torch.zeros(3, _DECADES + 2, dtype=torch.float64)
    zones[2, 0] = 0.5
    edges = [0.0]  # the values on both sides of every change of zone
    for decade in range(_DECADES):
        log = first + decade
        steps, high = 2.0**log, 10.0 ** (decade - _DECADES + 1)
        slope = high * 0.9 / steps
        decode[:, _leading_zeros(log)] = torch.tensor([slope, high * (0.45 / steps - 0.8)])
        base = steps - (0.1 * high + SMALLEST) / slope + least
        zones[:, 1 + decade] = torch.tensor([1 / slope, base, 2 * steps + least - 0.5])
        edges += [0.1 * high + 0.5 * slope, high - 0.5 * slope]
    last = first + _DECADES
    decode[1, _leading_zeros(last)] = 1
    zones[:, -1] = torch.tensor([0.0, 2.0**last + least, 2.0**last + least + 0.5])
    changes = torch.tensor([*edges, 1.0], dtype=torch.float64).view(-1, 2).mean(1)
    changes = (changes + SMALLEST).float().view(torch.int32)
    part = changes >> 24 & 15
    carry = torch.zeros(16, dtype=torch.int32).index_copy_(0, part.long(), (1 << 24) - (changes & 0xFFFFFF))
    zone = (torch.arange(1, 17)[:, None] > part).sum(1).roll(1)  # changes below the part; 0 stands for 16
    up, base, top = zones.float()[:, zone]
    slope, offset = decode.float()
    return Dynamic8Tables(slope, offset, carry, up, base, top)


def _leading_zeros(log: int) -> int:
    return (31 - log) % 16


@functools.cache
def dynamic8_map(signed: bool) -> torch.Tensor:
    """float32 [256], sorted: the value of each code."""
    tables = dynamic8_tables(signed)
    code = torch.arange(256)
    rank = (code - _ZERO).abs() if signed else code + 1
    log = rank.double().log2().floor().int()  # of 0: some index whose slope and offset are 0
    index = torch.where(rank == 0, 0, (31 - log) % 16).long()
    value = (tables.slope.double()[index] * rank + tables.offset.double()[index]).float()
    return torch.where(code < _ZERO, -value, value) if signed else value


def zeros_dynamic8(count: int, *, signed: bool) -> Dynamic8:
    """The state before the first step."""
    codes = torch.full((count,), _ZERO if signed else 0, dtype=torch.uint8)
    return Dynamic8(codes, torch.zeros(-(-count // BLOCK)), signed)


def quantize_dynamic8(values: torch.Tensor, *, signed: bool) -> Dynamic8:
    """Rounds float32 [n] to the nearest values of the map, ties away from 0; what a NaN becomes is not defined.

    In float32, so the border between two codes is within 1e-4 of a step of their middle.
    """
    tables = dynamic8_tables(signed)
    rows = torch.nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
    largest = rows.abs().nan_to_num(0.0, torch.inf).amax(1)
    inverse = 1 / largest.clamp_min(LEAST_LARGEST)
    x = (rows.abs().double() * inverse[:, None].double() + SMALLEST).float().view(-1)[: len(values)]
    bits = x.view(torch.int32)
    part = (bits + tables.carry[bits >> 24 & 15]) >> 24 & 15
    rank = (tables.up.double()[part] * x + tables.base.double()[part]).float()
    rank = torch.where(rank < tables.top[part], rank, tables.top[part]).int()
    code = torch.where(values < 0, (_ZERO - rank).clamp_min(0), _ZERO + rank) if signed else rank
    return Dynamic8(code.to(torch.uint8), largest, signed)


def dequantize_dynamic8(state: Dynamic8) -> torch.Tensor:
    """float32 [n]."""
    largest = state.largest.repeat_interleave(BLOCK)[: len(state.codes)]
    return dynamic8_map(state.signed)[state.codes.long()] * largest
