"""The fewest bytes that must stream, beside all choices of small models."""

from __future__ import annotations

import itertools
import random

import pytest
from test_predict import matrix

from offload.planner import exact
from offload.planner.exact import fewest_bytes
from offload.planner.placement import options_of
from offload.specs import UnitSpec


def by_enumeration(units: list[UnitSpec], capacity: int, limit: int, slots: int) -> int | None:
    total = sum(u.nbytes for u in units)
    sums = []
    for choice in itertools.product(*(options_of(u, 0) for u in units)):
        moved, slot = sum(o.nbytes for o in choice), max(o.slot for o in choice)
        if total - moved <= min(capacity - slots * slot, limit):
            sums.append(moved)
    return min(sums, default=None)


@pytest.mark.parametrize("seed", range(40))
def test_it_is_the_best_of_all(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(seed)
    shapes = [[draw.randint(1, 60) for _ in range(draw.randint(1, 3))] for _ in range(2)]
    units = [
        UnitSpec(name=f"u{k}", tensors=tuple(matrix(f"u{k}.{i}", rows, 8) for i, rows in enumerate(shapes[k % 2])))
        for k in range(draw.randint(2, 5))
    ]
    total = sum(u.nbytes for u in units)
    capacity, slots = int(total * draw.uniform(0.2, 1.2)), draw.randint(1, 3)
    limit = draw.choice((capacity, int(capacity * 0.8)))
    expected = by_enumeration(units, capacity, limit, slots)
    found = fewest_bytes(units, capacity, limit, slots, 0)
    assert (found is None) == (expected is None)
    if found is not None:
        streamed, ring = found
        moved = sum(t.nbytes for ts in streamed.values() for t in ts)
        assert moved == expected
        assert total - moved <= min(capacity - ring.nbytes, limit)
        monkeypatch.setattr(exact, "QUANTA", 50)  # rounded, it is still a choice that fits, and near
        rounded = fewest_bytes(units, capacity, limit, slots, 0)
        if rounded is not None:
            streamed, ring = rounded
            moved = sum(t.nbytes for ts in streamed.values() for t in ts)
            assert total - moved <= min(capacity - ring.nbytes, limit)
            assert moved >= expected
