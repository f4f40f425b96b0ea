"""The fewest bytes that must stream, exactly: which sums can the units' subsets make, and which is the smallest enough?

One slot size is chosen, which no chosen subset exceeds; the ring's slots are paid from the same memory:

    min  sum of the chosen subsets' bytes
    s.t. that sum >= all bytes - (capacity - depth * slot),  one subset for each unit, none larger than the slot

For a slot, the sums that the first k units can make are the set bits of one large integer: those of k - 1 units shifted
by each subset's bytes. Bytes are counted in their greatest common divisor, so that the answer is exact, or in a
131,072th of the model where that is finer. A larger slot leaves less memory, so that the first slots decide.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import gcd

from offload.planner.placement import NO_RING, Option, Ring, Streams, options_of
from offload.specs import UnitSpec

QUANTA = 1 << 17  # of a model's bytes, at most: rounding costs less than a thousandth of them


def fewest_bytes(
    units: Sequence[UnitSpec], capacity: int, limit: int, slots: int | None, smallest: int
) -> Streams | None:
    """As `placement.smallest_stream`, which this replaces where it may take its time; `slots` must be a number."""
    assert slots is not None
    kinds = [tuple((t.slot_nbytes, t.nbytes, t.is_table) for t in u.tensors) for u in units]
    options = {kind: options_of(units[kinds.index(kind)], smallest) for kind in Counter(kinds)}
    total = sum(t.nbytes for u in units for t in u.tensors if not t.is_table)
    quantum = max(gcd(*(o.nbytes for choice in options.values() for o in choice)), -(-total // QUANTA), 1)
    best: tuple[int, list[Option]] | None = None
    for slot in sorted({o.slot for choice in options.values() for o in choice}):
        keep = min(capacity - slots * slot, limit)
        need = total - keep
        if keep < 0 or (best is not None and need >= best[0]):
            break  # and so for every larger slot
        usable = {kind: [o for o in choice if o.slot <= slot] for kind, choice in options.items()}
        chosen = _smallest_sum([usable[kind] for kind in kinds], need, quantum)
        if chosen is not None and (best is None or sum(o.nbytes for o in chosen) < best[0]):
            best = sum(o.nbytes for o in chosen), chosen
    if best is None:
        return None
    left: dict[object, list[Option]] = {kind: [] for kind in options}
    for kind, option in zip(kinds, best[1], strict=True):
        left[kind].append(option)
    chosen = _spread(kinds, left)
    streamed = {u.name: tuple(u.tensors[i] for i in o.chosen) for u, o in zip(units, chosen, strict=True) if o.chosen}
    return streamed, Ring(slots, max(o.slot for o in chosen)) if streamed else NO_RING


def _smallest_sum(choices: Sequence[Sequence[Option]], need: int, quantum: int) -> list[Option] | None:
    """An option of each, whose bytes are together the fewest that are at least `need`; None where all are fewer."""
    if sum(choice[-1].nbytes for choice in choices) < need:
        return None
    reached = [1]
    for choice in choices:
        before, now = reached[-1], 0
        for size in {o.nbytes // quantum for o in choice}:
            now |= before << size
        reached.append(now)
    least = max(0, -(-need // quantum))
    enough = reached[-1] >> least
    if not enough:  # by the last quantum, which rounding has taken
        return [choice[-1] for choice in choices]
    left = least + (enough & -enough).bit_length() - 1
    chosen = []
    for before, choice in zip(reached[-2::-1], choices[::-1], strict=True):
        option = next(o for o in choice if (size := o.nbytes // quantum) <= left and before >> (left - size) & 1)
        chosen.append(option)
        left -= option.nbytes // quantum
    return chosen[::-1]


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
