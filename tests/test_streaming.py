"""Long files are read and written through little memory that is used in turn."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from offload.io.engine import Engine
from offload.io.extents import ALIGNMENT, Extent
from offload.tiers import sink as sinks
from offload.tiers import wholes
from offload.tiers.layout import Piece, Source
from offload.tiers.ring import Ring
from offload.tiers.sink import Sink
from offload.tiers.wholes import bring_wholes


def test_runs_of_a_ring_never_overlap_and_are_whole() -> None:
    ring, numbers = Ring(16 * ALIGNMENT), random.Random(0)
    out: list[tuple[torch.Tensor, int]] = []
    for turn in range(2000):
        run = ring.take(numbers.randrange(0, 9 * ALIGNMENT))
        if run is None:
            tensor, written = out.pop(0)
            assert (tensor == written).all()
            ring.give_back()
            continue
        out.append((torch.frombuffer(run, dtype=torch.uint8).fill_(turn % 251), turn % 251))
    for tensor, written in out:
        assert (tensor == written).all()
    del tensor, run
    out.clear()
    ring.close()


def test_a_run_as_long_as_the_ring_comes_when_all_others_are_back() -> None:
    ring = Ring(4 * ALIGNMENT)
    assert ring.take(1) is not None
    assert ring.take(4 * ALIGNMENT) is None
    ring.give_back()
    assert ring.take(4 * ALIGNMENT) is not None
    assert ring.take(0) is None


@pytest.mark.parametrize("tail", [0, 1, ALIGNMENT - 1, ALIGNMENT])
def test_a_sink_takes_runs_that_are_copied_and_runs_that_are_filled_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tail: int
) -> None:
    monkeypatch.setattr(sinks, "CHUNK", 2 * ALIGNMENT)
    monkeypatch.setattr(sinks, "AHEAD", 4 * ALIGNMENT)
    numbers, expected = random.Random(tail), b"h" * ALIGNMENT
    with Engine() as engine, Sink(tmp_path / "file", engine, ALIGNMENT, 1 << 20, 9 * ALIGNMENT) as sink:
        for turn in range(200):
            data = numbers.randbytes(numbers.randrange(7 * ALIGNMENT) if turn % 3 else numbers.randrange(9))
            if turn % 2:
                room = sink.room(9 * ALIGNMENT)  # more than it takes
                assert room.data_ptr() % ALIGNMENT == len(expected) % ALIGNMENT
                room[: len(data)] = torch.tensor(list(data), dtype=torch.uint8)
                sink.grow(len(data))
            else:
                sink.append(torch.tensor(list(data), dtype=torch.uint8))
            expected += data
            assert sink.nbytes == len(expected) - ALIGNMENT
        data = bytes((tail - len(expected)) % ALIGNMENT)
        sink.append(torch.tensor(list(data), dtype=torch.uint8))
        sink.finish(b"h" * ALIGNMENT)
    assert (tmp_path / "file").read_bytes() == expected + data


def test_whole_tensors_come_in_order_put_together_and_cast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wholes, "AHEAD", 4 * ALIGNMENT)
    path, jobs, expected, found = tmp_path / "file", [], [], []
    stored = torch.randn(50_000).bfloat16()
    path.write_bytes(b"x" + stored.view(torch.uint8).numpy().tobytes())  # the file's odd bytes begin elements

    def piece(first: int, count: int, start: int) -> Piece:
        return Piece(Extent(str(path), 1 + 2 * first, 2 * count), torch.bfloat16, start, count)

    for turn, dtype in enumerate((torch.bfloat16, torch.float32) * 10):
        at = turn * 2000
        pieces = (piece(at + 3000, 1000, 0), piece(at, 3000, 1000))
        jobs.append((Source("w", dtype, (40, 100), pieces), lambda t: found.append(t.clone())))
        expected.append(torch.cat([stored[at + 3000 : at + 4000], stored[at : at + 3000]]).to(dtype).view(40, 100))
    with Engine() as engine:
        arrived: list[int] = []
        bring_wholes(jobs, engine, arrived.append)
        engine.check_integrity()
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert sum(arrived) >= 20 * 8000


def test_what_fails_while_others_are_read_leaves_nothing_in_flight(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(10 * ALIGNMENT))
    pieces = tuple(Piece(Extent(str(path), k * ALIGNMENT, ALIGNMENT), torch.uint8, 0, ALIGNMENT) for k in range(10))
    jobs = [(Source("w", torch.uint8, (ALIGNMENT,), (p,)), lambda tensor: 1 / 0) for p in pieces]
    with Engine() as engine:
        with pytest.raises(ZeroDivisionError):
            bring_wholes(jobs, engine)
        assert engine.statistics().in_flight == 0
