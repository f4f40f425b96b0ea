"""Reads that go to several places in memory, one after the other."""

from __future__ import annotations

import random

import pytest
from io_worlds import PAGE, World, memory, pattern

from offload.io.backends.base import MOST_PARTS


@pytest.mark.parametrize("block_nbytes", [PAGE, 3 * PAGE, 1 << 20])
@pytest.mark.parametrize("direct", [True, False])
def test_one_read_may_go_to_several_places(world: World, block_nbytes: int, direct: bool) -> None:
    contents = pattern(40 * PAGE + 99)
    engine = world.engine(block_nbytes=block_nbytes, direct=direct)
    file = engine.open(world.put(engine, contents))
    view, dice = world.buffer(60 * PAGE), random.Random(11)
    for _ in range(8):
        begin, views, free = dice.randrange(30), list[memoryview](), list(range(0, 60, 4))
        dice.shuffle(free)
        for at in free[: dice.randint(1, 11)]:
            views.append(view[at * PAGE : (at + dice.randint(1, 4)) * PAGE])
        view[:] = b"\xee" * len(view)
        nbytes = sum(map(len, views))
        there = min(nbytes, len(contents) - begin * PAGE)
        assert engine.read(file, begin * PAGE, views, need=there).result() == there
        assert b"".join(views)[:there] == contents[begin * PAGE :][:there]
        assert bytes(view).count(b"\xee" * PAGE) >= 60 - nbytes // PAGE - 1, "bytes outside were touched"


def test_more_places_than_one_transfer_takes(world: World) -> None:
    count = MOST_PARTS + 76
    contents = pattern(count * PAGE)
    engine = world.engine(block_nbytes=8 << 20)
    file = engine.open(world.put(engine, contents))
    view = world.buffer(count * PAGE)
    views = [view[k * PAGE : (k + 1) * PAGE] for k in reversed(range(count))]
    assert engine.read(file, 0, views).result() == len(contents)
    assert b"".join(views) == contents
    assert engine.fallbacks == ()


def test_short_transfers_end_anywhere_in_several_places(fake) -> None:
    for seed in range(100):
        engine, backend = fake(block_nbytes=3 * PAGE)
        dice = random.Random(seed)
        contents = pattern(12 * PAGE + dice.randrange(PAGE), seed)
        file = engine.open(backend.disk.put("file", contents))
        backend.disk.shorten(seed)
        views = [memory(dice.randint(1, 4) * PAGE) for _ in range(13)]
        assert engine.read(file, 0, views, need=len(contents)).result() == len(contents)
        assert b"".join(views)[: len(contents)] == contents
