"""Which cells of training stay in memory, and how large the ring for the others is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from offload.errors import BudgetError
from offload.units import MIB, format_bytes

WORK = 64 * MIB  # that a ring of small slots holds at least, so that the disk need not pause
FEWEST, MOST = 3, 8  # slots: one in use, one that is read, one that is written


@dataclass(frozen=True, kw_only=True)
class CellPlan:
    """Attributes:
    kept: cells that stay.
    slots, slot_nbytes: of the ring; 0 where all stay.
    nbytes: of what stays and of the ring.
    travels_nbytes: of the cells that do not stay.
    """

    kept: frozenset[str]
    slots: int
    slot_nbytes: int
    nbytes: int
    travels_nbytes: int


def plan_cells(cells: Mapping[str, int], room: int, most: int | None = None) -> CellPlan:
    """The fewest bytes that travel.

    A slot is as large as the largest cell that travels; of all sizes, the one that lets the most stay is best. What
    stays is spread evenly, so that the disk always has about as much to do. What has no bytes stays.

    Args:
        cells: name -> bytes, in the order of their use.
        room: bytes for cells that stay and for the ring.
        most: bytes of cells that stay at most, whatever there is room for.

    Raises:
        BudgetError: not even the ring fits.
    """
    total = sum(cells.values())
    most = total if most is None else most
    if total <= min(room, most):
        return CellPlan(kept=frozenset(cells), slots=0, slot_nbytes=0, nbytes=total, travels_nbytes=0)
    best = _best(cells, room, most, WORK) or _best(cells, room, most, 0)
    if best is None:
        largest = max(cells.values())
        raise BudgetError(
            f"{format_bytes(max(0, room))} is left for weights, and {FEWEST} slots for the largest part of the model "
            f"take {format_bytes(FEWEST * largest)}"
        )
    return best


def _best(cells: Mapping[str, int], room: int, most: int, work: int) -> CellPlan | None:
    """With a ring that holds so many bytes, or as few slots as will do; None: it does not fit."""
    total = sum(cells.values())
    best: CellPlan | None = None
    for size in sorted({n for n in cells.values() if n}, reverse=True):
        slots = min(MOST, max(FEWEST, -(-work // size)))
        must = sum(n for n in cells.values() if n > size)
        left = min(room - slots * size, most) - must
        if left < 0:
            continue
        small = sum(n for n in cells.values() if n <= size)
        kept, taken, wanted = {c for c, n in cells.items() if n > size or not n}, 0.0, 0.0
        for name, nbytes in cells.items():
            if name in kept:
                continue
            wanted += min(left, small) * nbytes / small
            if taken + nbytes / 2 <= wanted and taken + nbytes <= left:
                kept.add(name)
                taken += nbytes
        travels = total - sum(cells[c] for c in kept)
        if best is None or travels < best.travels_nbytes:
            held = total - travels + slots * size
            best = CellPlan(
                kept=frozenset(kept), slots=slots, slot_nbytes=size, nbytes=held, travels_nbytes=travels
            )  # fmt: skip
    return best
