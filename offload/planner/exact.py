"""The fewest bytes that must stream, exactly: an integer program over kinds of units, solved by HiGHS.

Units of the same shape are counted, not told apart: how many of each kind stream which subset of their tensors. One
slot size is chosen, which no chosen subset exceeds, and the ring's slots are paid from the same memory:

    min  sum n[kind, subset] * bytes[subset]
    s.t. sum over subsets of n[kind, .] = units of the kind
         n[kind, subset] <= units of the kind * (sum of z[slot] over slots that hold the subset)
         sum z = 1,  resident bytes + depth * sum slot * z[slot] <= capacity
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from offload.planner.placement import NO_RING, Option, Ring, Streams, options_of
from offload.specs import UnitSpec

SECONDS = 1.0  # at most; what was found by then counts
GAP = 1e-3  # relative: a thousandth of the bytes is not worth waiting for


def fewest_bytes(
    units: Sequence[UnitSpec], capacity: int, limit: int, slots: int | None, smallest: int
) -> Streams | None:
    """As `placement.smallest_stream`, which this replaces where it may take its time; `slots` must be a number."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp

    assert slots is not None
    kinds = [tuple((t.slot_nbytes, t.nbytes, t.is_table) for t in u.tensors) for u in units]
    counts = Counter(kinds)
    options = {kind: options_of(units[kinds.index(kind)], smallest) for kind in counts}
    total = sum(t.nbytes for u in units for t in u.tensors if not t.is_table)
    sizes = sorted({o.slot for choice in options.values() for o in choice})
    columns = [(kind, o) for kind, choice in options.items() for o in choice]
    n, m, unit = len(columns), len(sizes), 2.0**-20  # HiGHS likes numbers near 1: MiB
    moved = np.array([o.nbytes * unit for _, o in columns])
    rows, low, high = [], [], []

    def add(row: np.ndarray, least: float, most: float) -> None:
        rows.append(row)
        low.append(least)
        high.append(most)

    for kind, count in counts.items():
        add(np.array([float(k == kind) for k, _ in columns] + [0.0] * m), count, count)
    for j, (kind, option) in enumerate(columns):
        if option.slot > sizes[0]:
            row = np.zeros(n + m)
            row[j] = 1.0
            row[n:] = [-float(counts[kind]) if size >= option.slot else 0.0 for size in sizes]
            add(row, -np.inf, 0.0)
    add(np.array([0.0] * n + [1.0] * m), 1, 1)
    ring = np.array([slots * size * unit for size in sizes])
    add(np.concatenate([moved, -ring]), (total - capacity) * unit, np.inf)
    add(np.concatenate([moved, np.zeros(m)]), (total - limit) * unit, np.inf)
    found = milp(
        np.concatenate([moved, ring * 1e-6]),
        integrality=np.ones(n + m),
        bounds=Bounds(0, np.concatenate([[float(counts[kind]) for kind, _ in columns], np.ones(m)])),
        constraints=LinearConstraint(np.array(rows), low, high),
        options={"time_limit": SECONDS, "mip_rel_gap": GAP},
    )
    if found.x is None:
        return None
    left: dict[object, list[Option]] = {kind: [] for kind in counts}
    for (kind, option), amount in zip(columns, found.x[:n], strict=True):
        left[kind] += [option] * round(float(amount))
    chosen = _spread(kinds, left)
    streamed = {u.name: tuple(u.tensors[i] for i in o.chosen) for u, o in zip(units, chosen, strict=True) if o.chosen}
    if not streamed:
        return streamed, NO_RING
    ring_slots = Ring(slots, max(o.slot for o in chosen))
    kept = total - sum(o.nbytes for o in chosen)
    if kept > min(capacity - ring_slots.nbytes, limit):  # rounding in the solver
        return None
    return streamed, ring_slots


def _spread(kinds: Sequence[object], left: dict[object, list[Option]]) -> list[Option]:
    """Deals the subsets of each kind to its units, so that what streamed so far stays near an even share."""
    total = sum(o.nbytes for choice in left.values() for o in choice)
    chosen: list[Option] = []
    moved = 0.0
    for k, kind in enumerate(kinds, 1):
        share = total * k / len(kinds)
        best = min(left[kind], key=lambda o: (abs(moved + o.nbytes - share), o))
        left[kind].remove(best)
        chosen.append(best)
        moved += best.nbytes
    return chosen
