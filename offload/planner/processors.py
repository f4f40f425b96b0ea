"""Which rows of a travelling matrix the CPU multiplies where they lie, instead of sending them to the accelerator.

A matrix that lives in main memory costs the link its bytes in every pass. The CPU can multiply by some of its rows
meanwhile: those rows never travel, and activations, which are small, cross instead. Of a matrix whose bytes the CPU
multiplies by at a rate C while a link of rate L brings the others, both finish together when the CPU has the share

    share = C / (C + L)

and the pass takes C + L instead of L. Share 0 is a block on the accelerator, 1 is one on the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from offload.errors import UsageError
from offload.specs import TensorSpec, UnitSpec

GRANULE = 16  # rows: less is not worth a cut
CUT_NBYTES = 16384  # of a slot that the first part of a cut tensor needs at most beyond its share: pages at its ends


@dataclass(frozen=True, kw_only=True)
class Cut:
    """What travels of each unit, and what the CPU keeps.

    Attributes:
        bundles: unit name -> the tensors, or first rows of tensors, that travel.
        first_rows: name of a cut tensor -> its first row that the CPU has; 0: it has them all.
        host_parts: unit name -> the rows that the CPU has, as tensors of their own.
    """

    bundles: Mapping[str, tuple[TensorSpec, ...]]
    first_rows: Mapping[str, int]
    host_parts: Mapping[str, tuple[TensorSpec, ...]]

    @property
    def host_nbytes(self) -> int:
        return sum(t.nbytes for ts in self.host_parts.values() for t in ts)


def parse_share(asked: float | str | None, device: str, exact: bool) -> float | None:
    """What `cpu_share` means: a number from 0 to 1, or None where rates shall decide.

    Raises:
        UsageError: not such a number; or there is nothing to share; or results shall be exact.
    """
    if asked is None or asked == "auto":
        return 0.0 if exact or device == "cpu" else None
    try:
        share = float(asked)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise UsageError(f'cpu_share={asked!r}: a number from 0 (all on the device) to 1 (all on the CPU), or "auto"')
    if share and device == "cpu":
        raise UsageError(f"cpu_share={asked!r} divides work between the CPU and an accelerator; the device is the CPU")
    if share and exact:
        raise UsageError(f"cpu_share={asked!r} and exact: another processor rounds otherwise; leave one of them out")
    return share


def balanced_share(cpu_bytes_per_s: float, link_bytes_per_s: float) -> float:
    """The share of travelling rows with which the CPU and the link finish together."""
    return cpu_bytes_per_s / (cpu_bytes_per_s + link_bytes_per_s)


def host_part(name: str, first_row: int) -> str:
    """The name of the rows that the CPU has."""
    return f"{name}[{first_row}:]"


@lru_cache(maxsize=8)  # a search asks for a few shares again and again
def with_device_slots(units: tuple[UnitSpec, ...], share: float) -> tuple[UnitSpec, ...]:
    """The same units, whose tensors need only as much of a slot as what will travel of them.

    What is put together from pieces arrives whole: its pieces take room in main memory's slots alone.
    """
    return tuple(replace(u, tensors=tuple(_slotted(t, share) for t in u.tensors)) for u in units)


def cut(bundles: Mapping[str, Sequence[TensorSpec]], share: float) -> Cut:
    """Leaves so large a share of each matrix to the CPU.

    A matrix that is stored packed is not cut: whole ones are left, as many as the share asks for, evenly.
    """
    kept: dict[str, tuple[TensorSpec, ...]] = {}
    first_rows: dict[str, int] = {}
    host_parts: dict[str, tuple[TensorSpec, ...]] = {}
    debt = 0.0  # packed bytes that the CPU should have had already
    for unit, tensors in bundles.items():
        travelling, staying = [], []
        for t in tensors:
            first = _first_row(t, share)
            if t.is_packed and t.outputs:
                debt += share * t.nbytes
                first = 0 if debt >= t.nbytes / 2 and share > 0 else t.outputs
                debt -= t.nbytes if first == 0 else 0
            if first > 0 or not t.outputs:
                travelling.append(_part(t, first) if first < t.outputs else t)
            if first < t.outputs:
                first_rows[t.name] = first
                staying.append(_part(t, t.outputs - first, host_part(t.name, first)))
        if travelling:
            kept[unit] = tuple(travelling)
        if staying:
            host_parts[unit] = tuple(staying)
    return Cut(bundles=kept, first_rows=first_rows, host_parts=host_parts)


def _first_row(t: TensorSpec, share: float) -> int:
    """Rows of a matrix that travel."""
    rows = round(share * t.outputs / GRANULE) * GRANULE if share < 1 else t.outputs
    return t.outputs - min(rows, t.outputs)


def _slotted(t: TensorSpec, share: float) -> TensorSpec:
    t, first = replace(t, slot_nbytes=t.slot_nbytes - t.staged_nbytes), _first_row(t, share)
    if first == t.outputs or (t.is_packed and first):
        return t
    return replace(t, slot_nbytes=_slot_nbytes(t, first))


def _part(t: TensorSpec, rows: int, name: str | None = None) -> TensorSpec:
    """So many rows of a matrix."""
    return replace(
        t,
        name=name or t.name,
        nbytes=_scaled(t.nbytes, rows, t),
        read_nbytes=_scaled(t.read_nbytes, rows, t),
        slot_nbytes=_slot_nbytes(t, rows),
        outputs=rows,
    )


def _slot_nbytes(t: TensorSpec, rows: int) -> int:
    return min(t.slot_nbytes, _scaled(t.slot_nbytes, rows, t) + CUT_NBYTES) if rows else 1


def _scaled(nbytes: int, rows: int, t: TensorSpec) -> int:
    return -(-nbytes * rows // t.outputs)
