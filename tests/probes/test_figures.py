"""How figures are taken: medians by a clock of our own, scratch files that vanish, pairs, neighbours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest

from offload.errors import StorageError
from offload.hardware import disk_of
from offload.probes import disk, quiet
from offload.probes.interference import ROUNDS, Activity, IsOver, matrix
from offload.probes.sampling import Allowance, Meter, Sample


def clock(*steps: float) -> Callable[[], float]:
    """Goes on by these steps in turn, one at each look."""
    ticks, time = count(), [0.0]

    def now() -> float:
        time[0] += steps[next(ticks) % len(steps)]
        return time[0]

    return now


def test_a_sample_is_a_median() -> None:
    assert Sample.of([1.0, 2.0, 9.0]) == Sample(2.0, 0.5, 3)
    assert Sample.of([2.0]).scaled(3.0) == Sample(6.0, 0.0, 1)


def test_pieces_go_in_turn_and_the_first_are_not_counted() -> None:
    order: list[str] = []
    sample = Meter(4, 0.0, now=clock(1.0)).time(*(lambda name=name: order.append(name) for name in "abc"))
    assert sample == Sample(1.0, 0.0, 4)
    assert "".join(order) == "ab" + "abca"


def test_a_figure_ends_when_its_time_is_over() -> None:
    assert Meter(2, 100.0, now=clock(1.0)).time(lambda: None).count == 20, "ten times the rounds at most"
    assert Meter(2, 7.0, now=clock(1.0)).time(lambda: None).count < 20


def test_figures_share_the_seconds_of_a_part() -> None:
    now = clock(1.0)
    allowance = Allowance(20.0, 2, now)
    meter = Meter(100, 100.0, now=now, allowance=allowance)
    first = meter.time(lambda: None).count
    assert 1 < first < 10, "half of them, and each look at the clock takes one"
    assert meter.time(lambda: None).count > 1, "the other half"
    assert meter.time(lambda: None).count == 1, "never less than one"


def test_what_a_figure_leaves_others_may_use() -> None:
    allowance = Allowance(10.0, 2, lambda: 0.0)
    assert allowance.next() == 5.0
    assert allowance.next() == 10.0


def test_reading_and_writing(tmp_path: Path) -> None:
    with disk.scratch(tmp_path, 1 << 20) as (path, fd):
        assert not list(tmp_path.iterdir()), "it has no name from the beginning"
        disk.fill(path, fd)
        read = list(disk.rates(path, ((65536, 1), (65536, 3), (1 << 30, 1)), 0.0, fd=fd))
        written = list(disk.rates(path, ((65536, 2),), 0.0, fd=fd, is_write=True))
    assert [(r.nbytes, r.threads) for r in (*read, *written)] == [(65536, 1), (65536, 3), (65536, 2)]


def test_an_interrupt_leaves_no_file(tmp_path: Path) -> None:
    def interrupted() -> bool:
        raise KeyboardInterrupt

    with disk.scratch(tmp_path, 1 << 20) as (path, fd), disk.stream(path, 65536, 2, fd=fd, is_write=True) as one:
        with pytest.raises(KeyboardInterrupt):
            one.run(1.0, interrupted)
        assert not list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = replace(disk_of(tmp_path), total=100 << 30, free=2 << 30)
    monkeypatch.setattr(disk, "disk_of", lambda _: full)
    with pytest.raises(StorageError, match=r"2\.00 GiB of 100\.0 GiB are free"), disk.scratch(tmp_path, 1 << 20):
        raise AssertionError("unreachable")
    assert not list(tmp_path.iterdir())


def test_what_pairs_keep() -> None:

    def loop(name: str, alone: float, beside: float) -> Callable[[IsOver], float]:
        def run(is_over: IsOver) -> float:
            seen[name] = seen.get(name, -1) + 1
            return alone if seen[name] % (2 * ROUNDS + 1) % 2 == 0 else beside

        return run

    seen: dict[str, int] = {}
    lanes = [Activity(name="read", loop=loop("read", 4.0, 2.0)), Activity(name="write", loop=loop("write", 4.0, 8.0))]
    work = [Activity(name=n, loop=loop(n, 10.0, 9.0), is_lane=False) for n in ("cpu", "cpu.gemm")]
    kept = matrix([*lanes, *work], 0.0)
    assert kept["read"] == {"write": 0.5, "cpu": 0.5, "cpu.gemm": 0.5}
    assert kept["write"]["read"] == 1.0, "nothing is faster in company"
    assert kept["cpu"] == {"read": 0.9, "write": 0.9}, "two kinds of work of one processor are no pair"
    seen.clear()
    copying = Activity(name="cpu.copy", loop=loop("cpu.copy", 2.0, 1.0), beside=("cpu",))
    kept = matrix([*lanes, copying, *work], 0.0)
    assert kept["cpu.copy"] == {"cpu": 0.5}, "it is measured beside what it ever runs beside"


def test_a_failure_beside_something_else_is_raised() -> None:
    def fails(_: IsOver) -> float:
        raise StorageError("gone", path="x")

    with pytest.raises(StorageError, match="gone"):
        matrix([Activity(name="read", loop=fails), Activity(name="write", loop=lambda _: 1.0)], 0.0)


def test_what_is_said_of_neighbours_and_drift() -> None:
    quiet_one = quiet.Repeated(drift=0.01, noise=0.01)
    assert quiet.notes(0.01, quiet_one) == ()
    assert "not quiet: other processes took 20%" in quiet.notes(0.2, quiet_one)[0]
    assert "8% slower at the end" in quiet.notes(0.0, quiet.Repeated(drift=0.08, noise=0.0))[0]


def test_key_figures_again() -> None:
    found = quiet.repeat_keys({"a": 1.0, "b": 3.0}, {"a": lambda: 1.0, "b": lambda: 2.0})
    assert found == quiet.Repeated(drift=0.25, noise=0.125)
