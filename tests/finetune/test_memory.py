"""Memory that was freed in between goes back to the system when the process is near its budget, and only then."""

from __future__ import annotations

import numpy as np

from offload.finetune.memory import give_back
from offload.hardware import rss_bytes
from offload.units import GIB, MIB


def test_holes_are_given_back_near_the_budget() -> None:
    blocks = [np.ones(12_000) for _ in range(2000)]  # of 96 kB: from the heap, which blocks that stay cut into holes
    stay = blocks[::50]
    del blocks
    before = rss_bytes()
    give_back(1000 * GIB)
    assert before - rss_bytes() < 10 * MIB
    give_back(before)
    assert before - rss_bytes() > 100 * MIB
    assert all(block.all() for block in stay)
