"""Extents: aligned supersets, and merging that loses nothing."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from offload.io.extents import ALIGNMENT, Extent, coalesce

EXTENTS = st.builds(Extent, st.sampled_from("ab"), st.integers(0, 400), st.integers(0, 60))


def test_aligned_superset() -> None:
    assert Extent("f", 4097, 10).aligned() == Extent("f", 4096, 4096)
    assert Extent("f", 0, 4096).aligned() == Extent("f", 0, 4096)
    assert Extent("f", 4095, 2).aligned() == Extent("f", 0, 8192)
    assert Extent("f", 8192, 0).aligned() == Extent("f", 8192, 0)
    assert Extent("f", 513, 1).aligned(512) == Extent("f", 512, 512)
    assert Extent("f", 5, 7).aligned(1) == Extent("f", 5, 7)


@given(EXTENTS, st.sampled_from([1, 2, 16, 512, ALIGNMENT]))
@settings(derandomize=True, max_examples=100)
def test_aligned_is_the_smallest(extent: Extent, alignment: int) -> None:
    found = extent.aligned(alignment)
    assert found.offset % alignment == found.nbytes % alignment == 0
    assert extent.offset - alignment < found.offset <= extent.offset
    assert extent.end <= found.end < extent.end + alignment


def test_coalesce_by_hand() -> None:
    extents = [Extent("b", 0, 5), Extent("a", 100, 10), Extent("a", 0, 50), Extent("a", 60, 10), Extent("a", 5, 5)]
    assert [(s.extent, s.members) for s in coalesce(extents, max_gap=10)] == [
        (Extent("a", 0, 70), (2, 4, 3)),
        (Extent("a", 100, 10), (1,)),
        (Extent("b", 0, 5), (0,)),
    ]
    assert coalesce([]) == []


@given(st.lists(EXTENTS, max_size=12), st.integers(0, 40))
@settings(derandomize=True, max_examples=300)
def test_coalesce_conserves(extents: list[Extent], max_gap: int) -> None:
    spans = coalesce(extents, max_gap=max_gap)
    assert sorted(i for span in spans for i in span.members) == list(range(len(extents)))
    for span in spans:
        members = [extents[i] for i in span.members]
        assert {extent.path for extent in members} == {span.extent.path}
        assert min(extent.offset for extent in members) == span.extent.offset
        assert max(extent.end for extent in members) == span.extent.end
    for left, right in pairwise(spans):
        assert left.extent.path < right.extent.path or right.extent.offset - left.extent.end > max_gap
