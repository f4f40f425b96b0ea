"""Which share of the updates an accelerator makes, while the CPU makes the others.

The idea is that of Deep Optimizer States (Maurya et al., 2024, arXiv:2410.21316); the balance below is derived here.

Of each parameter that it updates, 12 bytes of masters and moments go up and 12 come back; of each that the CPU updates,
2 bytes of gradient come down and 2 of weights go up. Both directions of the link work at once, so with a CPU that
updates U parameters a second and a link of B bytes a second each way, a share f of the updates takes

    max((1 - f) / U, (2 + 10 f) / B)    seconds a parameter, least at    f* = (B/U - 2) / (B/U + 10)

All of it passes main memory, too: 28 bytes of a parameter that the CPU updates, 24 of one that crosses. So where the
CPU alone uses most of that, as on desktops, a share gains little, whatever the link is (`seconds_per_param`).
"""

from __future__ import annotations

from collections.abc import Iterable
from math import inf

STATE = 12.0  # bytes a parameter of AdamW's masters and moments, that cross both ways
CELL = 2.0  # of a weight, or a gradient


def balanced_share(params_per_s: float, bytes_per_s: float, *, state: float = STATE, cell: float = CELL) -> float:
    """The share with which CPU and link finish together; 0 where the link is no faster than what it has to do anyway.

    Args:
        params_per_s: what the CPU updates.
        bytes_per_s: of the link, each way, while it works both ways.
        state, cell: bytes a parameter that cross where the accelerator updates, and where the CPU does.
    """
    ratio = bytes_per_s / params_per_s
    return min(1.0, max(0.0, (ratio - cell) / (ratio + state - cell)))


def seconds_per_param(
    share: float,
    params_per_s: float,
    bytes_per_s: float,
    *,
    state: float = STATE,
    cell: float = CELL,
    touched: float = 28.0,
    memory_bytes_per_s: float = inf,
) -> float:
    """What a parameter's update takes in the mean: the slowest of CPU, link and main memory.

    Args:
        touched: bytes of main memory that the CPU's update of a parameter moves.
        memory_bytes_per_s: of main memory, all together.
    """
    up = cell + share * (state - cell)
    moved = (1 - share) * touched + 2 * up
    return max((1 - share) / params_per_s, up / bytes_per_s, moved / memory_bytes_per_s)


def spread(shards: Iterable[tuple[str, int]], share: float) -> frozenset[str]:
    """Shards that the accelerator updates: that share of all parameters, spread evenly, so that both always have work.

    Args:
        shards: names and parameters, in the order of their updates.
    """
    chosen: set[str] = set()
    taken, wanted = 0.0, 0.0
    for name, count in shards:
        wanted += count * share
        if taken + count / 2 <= wanted:
            chosen.add(name)
            taken += count
    return frozenset(chosen)
