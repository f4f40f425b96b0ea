"""Random directions: normal, the same in every implementation, bit by bit; and weights that move along them."""

from __future__ import annotations

import math

import pytest
import torch

from offload.kernels import choose, reference
from offload.kernels.reference import Along, Sides, direction
from offload.kernels.reference.directions import philox

FAST = choose("move_along", "cpu", forced="cpu").function()
COUNT = 1 << 20
INF = math.inf


@pytest.fixture(scope="module")
def z() -> torch.Tensor:
    return direction(Along(1, "a"), 1, COUNT).double()


@pytest.mark.parametrize(
    ("counter", "key", "rounds", "words"),
    [  # the known answers that Random123 is shipped with
        ((0, 0, 0, 0), (0, 0), 7, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        ((0, 0, 0, 0), (0, 0), 10, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, 10, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), 10,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)  # fmt: skip
def test_philox(counter: tuple[int, ...], key: tuple[int, int], rounds: int, words: tuple[int, ...]) -> None:
    found = philox(tuple(torch.tensor([c], dtype=torch.int64) for c in counter), key, rounds)
    assert tuple(int(word) for word in found) == words


def test_directions_are_standard_normal(z: torch.Tensor) -> None:
    """Each moment within five deviations of what that of so many normals has."""
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs(float((z**power).mean()) - expected) < 5 * math.sqrt(variance / COUNT), power
    ordered = z.sort().values
    exact = 0.5 * torch.erfc(-ordered / math.sqrt(2))
    steps = torch.arange(COUNT + 1, dtype=torch.float64) / COUNT
    distance = max(float((exact - steps[:-1]).abs().max()), float((exact - steps[1:]).abs().max()))
    assert distance * math.sqrt(COUNT) < 1.63  # Kolmogorov and Smirnov, 1 %


@pytest.mark.parametrize("bound", [1.0, 2.0, 3.0, 4.0, 4.5])
def test_tails_are_as_heavy_as_they_should_be(z: torch.Tensor, bound: float) -> None:
    expected = COUNT * math.erfc(bound / math.sqrt(2))
    for side in (z, -z):
        assert abs(int((side > bound).sum()) - expected / 2) < 5 * math.sqrt(expected / 2)


def test_every_radius_once() -> None:
    """All 2^18 radii there are, not a sample of them: their squares are exponential, of mean 2."""
    from offload.kernels.reference.directions import _radius

    squares = _radius(torch.arange(1 << 18) * 2 + 1).double() ** 2
    assert float(squares.mean()) == pytest.approx(2, rel=4e-6)
    assert float((squares**2).mean()) == pytest.approx(8, rel=1e-4)
    exact = -2 * torch.log((torch.arange(1 << 18, dtype=torch.float64) * 2 + 1) / 2**19)
    assert float(((squares - exact) / exact).abs().max()) < 3e-6
    assert float(squares.max()) > 5.1**2


def test_directions_are_independent_of_each_other(z: torch.Tensor) -> None:
    others = {
        "another step": direction(Along(1, "a"), 2, COUNT),
        "another name": direction(Along(1, "b"), 1, COUNT),
        "another seed": direction(Along(2, "a"), 1, COUNT),
        "a distant seed": direction(Along(1 + (1 << 32), "a"), 1, COUNT),
    }
    others |= {f"{apart} further on": z.roll(apart) for apart in (1, 2, 16, 64, 128, 512, 4096)}
    for name, other in others.items():
        for one, two in ((z, other.double()), (z**2 - 1, other.double() ** 2 - 1)):
            deviation = 1.0 if one is z else 2.0
            assert abs(float((one * two).mean())) < 5 * deviation / math.sqrt(COUNT), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("count", [1, 511, 512, 1000, 50_000])
@pytest.mark.parametrize("limit", [INF, 0.02])
def test_the_kernel_is_the_reference_bit_by_bit(count: int, limit: float, dtype: torch.dtype) -> None:
    weights = (torch.randn(count, generator=torch.Generator().manual_seed(count)) * 0.03).to(dtype)
    along, moves = Along(12345678901234567, "model.x", limit), [(1, 1e-3), (2, -2e-2), (70_000, 0.5)]
    found = []
    for function in (reference.move_along, FAST):
        kept, plus, minus = (torch.empty_like(weights) for _ in range(3))
        function(weights, along, moves, kept, Sides(70_001, 1e-2, plus, minus))
        found.append((kept, plus, minus))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_threads_and_parts_change_nothing() -> None:
    weights, before = torch.randn(200_000).bfloat16(), torch.get_num_threads()
    along, once, twice = Along(3, "w"), weights.clone(), weights.clone()
    FAST(once, along, [(1, 0.1), (2, 0.2)], once)
    torch.set_num_threads(1)
    try:
        FAST(twice, along, [(1, 0.1)], twice)
        FAST(twice, along, [(2, 0.2)], twice)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(once, twice)


def test_large_weights_stay_where_they_are() -> None:
    weights = torch.tensor([0.01, -0.03, 0.02, 0.5] * 100)
    FAST(weights, Along(1, "w", 0.025), [(1, 1e-3)], moved := weights.clone())
    assert torch.equal(moved == weights, torch.tensor([False, True, False, True] * 100))
