"""Random directions, any element of which can be computed alone, and weights moved along them, as MeZO steps are made.

A direction is standard normal. Its element i follows from the seed, the step, the parameter's name and i alone: Philox
makes 32 random bits for each pair of elements, which Box and Muller's transform makes into two independent normals.
Everything is integers, products and sums in float32 and square roots, each rounded once, in one order, so that every
implementation, on any processor and any number of threads, gives the same bits.

    32 bits   | 18: the radius | 12: the angle within a quadrant | 1: sign of the one | 1: sign of the other |

18 bits of radius reach 5.1 standard deviations. Odd moments are exactly zero; the variance is 1 within 2e-6, the
kurtosis 3 within 6e-5, and numbers beyond 4, 4.5 and 5 are 0.04, 1.2 and 4 percent rarer than they should be.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf

import numpy as np
import torch

BLOCK = 512  # elements: what 64 calls of Philox, one in each lane of a vector, make
LANES = 64
ROUNDS = 7  # with which Philox-4x32 passes all tests of BigCrush (Salmon et al., 2011)
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
MASK = 0xFFFFFFFF

ROOT_HALF = 0x3F3504F3  # bits of the float32 nearest to sqrt(1/2), from where a mantissa is taken
LOG = (-0.2379221916, 0.3733572066, -0.4099265933, 0.4981948733, -0.6662901640, 1.0000222921, -2.0000019073)
"""-2 ln(1 + f) / f for f from sqrt(1/2) - 1 to sqrt(2) - 1, highest power first; within 1.1e-6 of it."""
LOG_2 = -1.3862943611  # -2 ln 2
SIN = (0.0017225791 * 2.0**-60, -0.0570813566 * 2.0**-36, 0.5553596020 * 2.0**-12)
COS = (-0.0002254826 * 2.0**-72, 0.0112075824 * 2.0**-48, -0.2180888802 * 2.0**-24, 0.7071067691)
"""sin and cos of y pi / 16384 over sqrt(2), the first also over y, in powers of y^2; within 8e-7."""


@dataclass(frozen=True)
class Along:
    """A parameter's directions, one for each step.

    Attributes:
        seed: of the run.
        name: the parameter's.
        limit: only weights of at most this magnitude move (Sparse MeZO, Liu et al., 2024); by default all do.
    """

    seed: int
    name: str
    limit: float = inf

    @cached_property
    def words(self) -> tuple[int, int, int, int]:
        """Philox's key, and the upper half of its counters: 32 bits each."""
        name = int.from_bytes(hashlib.blake2b(self.name.encode(), digest_size=8).digest(), "little")
        return self.seed & MASK, self.seed >> 32 & MASK, name & MASK, name >> 32


@dataclass(frozen=True)
class Sides:
    """Where weights go that are moved by eps and by -eps along the direction of a step, from the same place."""

    step: int
    eps: float
    plus: torch.Tensor
    minus: torch.Tensor


def direction(along: Along, step: int, count: int) -> torch.Tensor:
    """The first `count` elements of a step's direction: float32, standard normal."""
    blocks = -(-count // BLOCK)
    k0, k1, c2, c3 = along.words
    index = torch.arange(blocks * LANES, dtype=torch.int64)
    words = torch.stack(philox((index, torch.full_like(index, step), torch.full_like(index, c2),
                                torch.full_like(index, c3)), (k0, k1)))  # fmt: skip
    pairs = torch.stack(_normals(words))  # [2, 4, blocks * LANES]
    ordered = pairs.view(2, 4, blocks, LANES).permute(2, 1, 0, 3)  # a word makes two vectors in a row
    return ordered.reshape(-1)[:count].contiguous()


def move_along(
    weights: torch.Tensor,
    along: Along,
    moves: Sequence[tuple[int, float]],
    kept: torch.Tensor | None,
    sides: Sides | None = None,
) -> None:
    """Moves weights along one direction after the other, rounding to their dtype after each; then to both sides.

    Rounding to bfloat16 makes zero of what is below the smallest normal number, 1.2e-38.

    Args:
        weights: bfloat16, float16 or float32, contiguous; not changed unless they are `kept` too.
        along: their directions.
        moves: (step, distance) of each, in order.
        kept: gets the weights after the moves, if given.
        sides: what gets them a little further on, to each side.
    """
    w = weights
    for step, by in moves:
        w = _moved(w, along, step, by)
    if sides is not None:
        sides.plus.copy_(_moved(w, along, sides.step, sides.eps))
        sides.minus.copy_(_moved(w, along, sides.step, -sides.eps))
    if kept is not None and kept is not w:
        kept.copy_(w)


def _moved(w: torch.Tensor, along: Along, step: int, by: float) -> torch.Tensor:
    z = direction(along, step, w.numel()).view(w.shape)
    out = _fma(torch.tensor(by, dtype=torch.float32), z, w.float())
    if w.dtype is torch.bfloat16:  # as AVX512-BF16 rounds
        out = torch.where(out.abs() < torch.finfo(torch.float32).tiny, 0 * out, out)
    out = out.to(w.dtype)
    return torch.where(torch.tensor(along.limit) < w.float().abs(), w, out) if along.limit != inf else out


def philox(counter: tuple[torch.Tensor, ...], key: tuple[int, int], rounds: int = ROUNDS) -> tuple[torch.Tensor, ...]:
    """Philox-4x32 (Salmon et al., 2011): four words of 32 random bits for each counter of four words.

    Args:
        counter: int64, from 0 to 2^32 - 1.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        high0, low0 = _product(c0, MULTIPLIERS[0])
        high1, low1 = _product(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def _product(a: torch.Tensor, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Upper and lower 32 bits of a product of 32-bit numbers, in int64 that never overflows."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    middle = high + (low >> 16)
    return middle >> 16, (middle << 16 | low & 0xFFFF) & MASK


def _normals(words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two float32 for each word (int64)."""
    radius = _radius(words >> 13 | 1)
    y = ((words & 0x3FFC) >> 1).float() - 4095  # odd, from -4095 to 4095
    square = y * y
    sine, cosine = _polynomial(SIN, square) * y, _polynomial(COS, square)
    one, other = radius * (cosine - sine), radius * (cosine + sine)
    return torch.where(words & 1 == 1, -one, one), torch.where(words & 2 == 2, -other, other)


def _radius(x: torch.Tensor) -> torch.Tensor:
    """sqrt(-2 ln(x / 2^19)) of odd x."""
    bits = x.float().view(torch.int32)
    exponent = (bits + (0x3F800000 - ROOT_HALF)) >> 23  # biased by 127, of a mantissa from sqrt(1/2) to sqrt(2)
    f = (bits - ((exponent - 127) << 23)).view(torch.float32) - 1
    whole = (exponent - 146).float() * torch.tensor(LOG_2, dtype=torch.float32)
    return torch.from_numpy(
        np.sqrt(_fma(_polynomial(LOG, f), f, whole).numpy())
    )  # torch's own is not rounded to nearest


def _polynomial(coefficients: tuple[float, ...], x: torch.Tensor) -> torch.Tensor:
    p = torch.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        p = _fma(p, x, torch.full_like(x, c))
    return p


def _fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """a * b + c of float32, rounded once.

    float64 holds the product exactly; the sum is rounded there to the neighbour with an odd last bit where it is not
    exact, so that the second rounding, to float32, is as if it were the only one (Boldo and Melquiond, 2008).
    """
    product, addend = a.double() * b.double(), c.double()
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)  # exactly what rounding took away (Knuth)
    bits = total.view(torch.int64)
    is_inexact = (error != 0) & (bits & 1 == 0)
    towards = torch.where((error > 0) == (total > 0), 1, -1)
    return torch.where(is_inexact, bits + towards, bits).view(torch.float64).float()
