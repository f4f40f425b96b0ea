"""The emulated link's pace, on a clock that only sleeping moves."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from offload.tiers import emulated
from offload.tiers.emulated import CHUNK, SMALL, EmulatedDevice

RATE = 4e9


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which copying does not take."""
    now = [100.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(emulated, "time", SimpleNamespace(perf_counter=lambda: now[0], sleep=sleep))
    return now


def test_a_long_copy_takes_its_bytes_over_the_rate(clock: list[float]) -> None:
    device = EmulatedDevice(0, RATE)
    source = torch.ones(3 * CHUNK + 5, dtype=torch.uint8)
    target = torch.zeros_like(source)
    device.upload([(target, source)], None)
    assert torch.equal(target, source)
    assert clock[0] - 100.0 == pytest.approx(source.numel() / RATE)


def test_a_small_copy_passes_a_large_one_which_ends_later_by_as_much(clock: list[float]) -> None:
    device = EmulatedDevice(0, RATE)
    lane, began = device._up, clock[0]
    lane._free_at = began + 1.0  # a copy that will go on for a second
    few = torch.ones(SMALL, dtype=torch.uint8)
    device.send(few, torch.zeros_like(few))
    assert clock[0] - began == pytest.approx(SMALL / RATE)
    assert lane._free_at - began == pytest.approx(1.0 + SMALL / RATE)
    more = torch.ones(SMALL + 1, dtype=torch.uint8)
    device.send(more, torch.zeros_like(more))
    assert clock[0] - began == pytest.approx(1.0 + (2 * SMALL + 1) / RATE)
