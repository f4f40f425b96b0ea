"""Items made ahead are the same ones, in the same order, errors included; and nobody is left behind."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest
from patience import HANGS_S

from offload.finetune.ahead import DEPTH, ahead


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name == "offload-data"]


def test_items_and_errors_come_in_their_order() -> None:
    def items() -> Iterator[int]:
        yield from range(50)
        raise ValueError("line 51")

    feed = ahead(items())
    assert [next(feed) for _ in range(50)] == list(range(50))
    with pytest.raises(ValueError, match="line 51"):
        next(feed)
    assert list(ahead(iter(range(7)))) == list(range(7))
    assert threads() == []


def test_no_more_are_made_than_wait() -> None:
    made: list[int] = []
    first = threading.Event()

    def items() -> Iterator[int]:
        for k in itertools.count():
            made.append(k)
            if k == DEPTH + 1:
                first.set()
            yield k

    with closing(ahead(items())) as found:
        assert next(found) == 0
        assert first.wait(HANGS_S), "it works ahead"
        for k in range(1, 20):
            assert next(found) == k
            assert len(made) <= k + 1 + DEPTH + 1
    assert threads() == []


def test_nothing_begins_before_it_is_asked_for() -> None:
    ahead(iter(range(3)))
    assert threads() == []
