"""How much of a slot a tensor needs, from its bytes and those of the pieces that it is read as."""

from __future__ import annotations

from collections.abc import Iterable

from offload.io.extents import ALIGNMENT

OVERHEAD = 3 * ALIGNMENT  # of one extent in a slot, at most: rounding at both ends and one hole
VIEW_ALIGNMENT = 64


def slot_nbytes(nbytes: int, pieces: Iterable[int], *, is_plain: bool) -> int:
    """Bytes of a slot that a tensor needs at most.

    Args:
        nbytes: in memory.
        pieces: bytes of each stored piece.
        is_plain: a view into the bytes of the file is the tensor; else it is assembled beside them.
    """
    if is_plain:
        return nbytes + OVERHEAD
    return round_up(nbytes, VIEW_ALIGNMENT) + sum(piece + OVERHEAD for piece in pieces) + ALIGNMENT


def round_up(n: int, to: int) -> int:
    """The next multiple of `to`."""
    return -(-n // to) * to
