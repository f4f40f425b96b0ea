"""Which tensors stay in memory, which stream, and through how large a ring: the first placement.

Every pass of a decoder uses every weight once, in the same order. A cyclic scan defeats recency caches, so a fixed
subset is pinned and only the rest streams. The rest is spread: each unit streams a part of about the same size, so that
reads hide behind compute evenly and the slots of the ring stay small, which leaves more memory for pinning.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import accumulate
from typing import NamedTuple

from offload.errors import BudgetError
from offload.planner.processors import cut, with_device_slots
from offload.specs import ModelSpec, TensorSpec, UnitSpec
from offload.units import MIB, format_bytes


class Tier(StrEnum):
    """Where a tensor lives, fastest first."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


class TooSmall(BudgetError):
    """A tier cannot hold what must be there.

    Attributes:
        missing: bytes that its capacity lacks.
        is_device: whether it is the device's memory that is too small.
    """

    def __init__(self, missing: int, message: str, *, is_device: bool = False) -> None:
        super().__init__(message)
        self.missing, self.is_device = missing, is_device


@dataclass(frozen=True, slots=True)
class Ring:
    """Equal slots that streaming bundles take in turn."""

    slots: int
    slot_nbytes: int

    @property
    def nbytes(self) -> int:
        return self.slots * self.slot_nbytes


NO_RING = Ring(0, 0)
LOOKAHEAD = 64 * MIB
MOST_SLOTS = 8


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where every tensor lives and how it travels.

    Attributes:
        home: tensor name -> tier. Without an accelerator, `host` is where the model computes.
        tables: streaming tensors of which only rows are gathered; they need no slot.
        host_ring: slots in main memory for bundles read from disk.
        device_ring: slots on the accelerator for bundles uploaded; empty without one.
        bundles: unit name -> the tensors of it that travel in every pass.
        first_rows: matrix that the CPU multiplies by a part of -> its first row that the CPU has; 0: it has them all.
            `bundles` hold the rows before it.
        host_parts: unit name -> the rows that the CPU has, as tensors of their own, which `home` knows too.
    """

    home: Mapping[str, Tier]
    tables: frozenset[str]
    host_ring: Ring
    device_ring: Ring
    bundles: Mapping[str, tuple[TensorSpec, ...]]
    first_rows: Mapping[str, int] = field(default_factory=dict)
    host_parts: Mapping[str, tuple[TensorSpec, ...]] = field(default_factory=dict)

    def names(self, tier: Tier) -> frozenset[str]:
        return frozenset(name for name, home in self.home.items() if home is tier)


Streams = tuple[dict[str, tuple[TensorSpec, ...]], Ring]
"""Unit name -> the tensors of it that stream, and the ring they pass through."""

Solve = Callable[[Sequence[UnitSpec], int, int, int | None, int], Streams | None]
"""Chooses what streams, from (units, capacity, most bytes of weights, slots, smallest tensor that streams)."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """Which tensors of a list of units stay on a tier and which come from below it."""

    resident: frozenset[str]
    streamed: Mapping[str, tuple[TensorSpec, ...]] = field(default_factory=dict)
    tables: frozenset[str] = frozenset()
    ring: Ring = NO_RING


def place(
    spec: ModelSpec,
    *,
    host_nbytes: int,
    device_nbytes: int | None = None,
    slots: int | None = None,
    host_target: int | None = None,
    cpu_share: float = 0.0,
    solve: Solve | None = None,
) -> Placement:
    """Chooses a home for every tensor.

    Args:
        spec: the model.
        host_nbytes: main memory for weights and the ring.
        device_nbytes: the same for the accelerator, loose tensors included; None without one.
        slots: depth of each ring; None: two, which keep the disk busy as long as a unit computes faster than it is
            read, or more where slots are small.
        host_target: bytes of weights that should stay in main memory, when somebody forces it.
        cpu_share: of the rows of matrices that live in main memory: what the CPU multiplies by, where there is an
            accelerator. Less where they do not fit there.
        solve: chooses what streams; default: `smallest_stream`.

    Raises:
        BudgetError: not even the smallest ring fits.
    """
    if device_nbytes is not None:
        for share in dict.fromkeys((cpu_share, cpu_share * 3 / 4, cpu_share / 2, cpu_share / 4)):
            try:
                return _place_on_two(spec, host_nbytes, device_nbytes, slots, host_target, share, solve)
            except TooSmall as error:
                if error.is_device:
                    raise
        return _place_on_two(spec, host_nbytes, device_nbytes, slots, host_target, 0.0, solve)
    host = split(spec.units, host_nbytes - spec.loose_nbytes, slots=slots, target=host_target, solve=solve)
    home = {t.name: Tier.DISK for u in spec.units for t in u.tensors}
    home |= {t.name: Tier.HOST for t in spec.loose} | dict.fromkeys(host.resident, Tier.HOST)
    return Placement(home=home, tables=host.tables, host_ring=host.ring, device_ring=NO_RING, bundles=host.streamed)


def _place_on_two(
    spec: ModelSpec,
    host_nbytes: int,
    device_nbytes: int,
    slots: int | None,
    host_target: int | None,
    share: float,
    solve: Solve | None,
) -> Placement:
    """A placement with an accelerator, of whose travelling rows the CPU multiplies by a share."""
    try:
        units = with_device_slots(spec.units, share)
        device = split(units, device_nbytes - spec.loose_nbytes, slots=slots, solve=solve)
    except TooSmall as error:
        raise TooSmall(error.missing, str(error), is_device=True) from None
    whole = {t.name: t for u in spec.units for t in u.tensors}
    below = cut({n: [whole[t.name] for t in ts] for n, ts in device.streamed.items()}, share)
    travelling = [UnitSpec(name=n, tensors=ts) for n, ts in below.bundles.items()]
    if device.tables:
        travelling.append(UnitSpec(name="tables", tensors=tuple(whole[n] for n in sorted(device.tables))))
    left = None if host_target is None else host_target - below.host_nbytes
    if below.host_parts and min(host_nbytes - below.host_nbytes, 0 if left is None else left) < 0:
        raise TooSmall(below.host_nbytes - host_nbytes, "main memory cannot hold the rows that the CPU would have")
    host = split(travelling, host_nbytes - below.host_nbytes, slots=slots, target=left, solve=solve)
    home = dict.fromkeys(whole, Tier.DISK) | {t.name: Tier.DEVICE for t in spec.loose}
    home |= dict.fromkeys(host.resident, Tier.HOST) | dict.fromkeys(device.resident, Tier.DEVICE)
    home |= {name: Tier.HOST for name, first in below.first_rows.items() if first == 0}
    home |= {part.name: Tier.HOST for parts in below.host_parts.values() for part in parts}
    return Placement(
        home=home,
        tables=host.tables | device.tables,
        host_ring=host.ring,
        device_ring=device.ring if below.bundles else NO_RING,  # the CPU may have all that would travel
        bundles=below.bundles,
        first_rows=below.first_rows,
        host_parts=below.host_parts,
    )


def split(
    units: Sequence[UnitSpec],
    capacity: int,
    *,
    slots: int | None = None,
    target: int | None = None,
    solve: Solve | None = None,
) -> Split:
    """Keeps as much as `capacity` bytes allow, ring included; with a `target`, no more than so many bytes of weights.

    Tables that are not kept cost no slot. Tensors much smaller than the others stay whenever they can: they would
    add requests and save nothing.

    Raises:
        BudgetError: `capacity` is too small for the smallest ring and what cannot stream.
    """
    tensors = [t for u in units for t in u.tensors]
    total = sum(t.nbytes for t in tensors)
    limit = capacity if target is None else min(capacity, target)
    if total <= limit:
        return Split(resident=frozenset(t.name for t in tensors))
    tables = {t.name for t in tensors if t.is_table}
    whole = [t for t in tensors if not t.is_table]
    mean = sum(t.nbytes for t in whole) / max(1, len(units))
    best = None
    pinned = int(mean / 64)
    for deep, smallest in ((slots, pinned), (slots or 2, pinned), (slots or 2, 0)):  # as wished for, then as it works
        best = (solve or smallest_stream)(units, capacity, limit, deep, smallest)
        if best is not None:
            slots = deep
            break
    if best is None:
        slots = slots or 2
        need = _smallest_capacity(units, slots)
        raise TooSmall(
            need - capacity,
            f"{format_bytes(max(0, capacity))} is left for weights, but streaming this model needs at least "
            f"{format_bytes(need)}: {slots} slots for the largest tensor, and what cannot stream.",
        )
    streamed, ring = best
    out = {t.name for ts in streamed.values() for t in ts}
    resident = {t.name for t in whole if t.name not in out}
    free = min(capacity - ring.nbytes, limit) - sum(t.nbytes for t in whole if t.name in resident)
    for table in sorted((t for t in tensors if t.is_table), key=lambda t: t.nbytes):
        if table.nbytes <= free and not streamed:  # rows cost next to nothing: weights come first
            free -= table.nbytes
            resident.add(table.name)
    return Split(resident=frozenset(resident), streamed=streamed, tables=frozenset(tables - resident), ring=ring)


class Option(NamedTuple):
    """A subset of a unit's tensors that may stream: bytes that move, which tensors, bytes of a slot."""

    nbytes: int
    chosen: tuple[int, ...]
    slot: int


Options = list[Option]  # ascending


def options_of(unit: UnitSpec, smallest: int) -> Options:
    """Subsets of a unit's tensors that may stream."""
    free = [i for i, t in enumerate(unit.tensors) if not t.is_table and t.nbytes >= smallest and t.nbytes > 0]
    found: dict[int, tuple[int, ...]] = {0: ()}
    if len(free) <= 10:
        for i in free:
            size = unit.tensors[i].slot_nbytes
            for have, chosen in list(found.items()):
                found.setdefault(have + size, (*chosen, i))
    else:  # many tensors: prefixes are choice enough
        for n, size in enumerate(accumulate(unit.tensors[i].slot_nbytes for i in free), 1):
            found[size] = tuple(free[:n])
    return sorted(Option(sum(unit.tensors[i].nbytes for i in c), c, slot) for slot, c in found.items())


def smallest_stream(
    units: Sequence[UnitSpec], capacity: int, limit: int, slots: int | None, smallest: int
) -> Streams | None:
    """The choice of streaming subsets that moves the fewest bytes, with its ring; None when nothing fits."""
    kinds = [tuple((t.slot_nbytes, t.nbytes, t.is_table) for t in u.tensors) for u in units]
    counts = Counter(kinds)
    shapes = {kind: options_of(units[kinds.index(kind)], smallest) for kind in counts}
    total = sum(t.nbytes for u in units for t in u.tensors if not t.is_table)
    best: tuple[int, int, list[Option]] | None = None
    for slot in sorted({option.slot for choice in shapes.values() for option in choice}):
        keep = min(capacity - depth(slot, slots) * slot, limit)
        if keep < 0 or (best is not None and total - keep >= best[0]):
            continue
        usable = {kind: [o for o in choice if o.slot <= slot] for kind, choice in shapes.items()}
        if total - sum(usable[kind][-1].nbytes * count for kind, count in counts.items()) > keep:
            continue
        chosen = _spread([usable[kind] for kind in kinds], total - keep)
        moved = sum(option.nbytes for option in chosen)
        if best is None or moved < best[0]:
            best = moved, slot, chosen
    if best is None:
        return None
    streamed = {u.name: tuple(u.tensors[i] for i in o.chosen) for u, o in zip(units, best[2], strict=True) if o.chosen}
    if not streamed:
        return streamed, NO_RING
    slot = max(sum(t.slot_nbytes for t in ts) for ts in streamed.values())
    return streamed, Ring(depth(best[1], slots), slot)  # no deeper than was counted, though its slots may be smaller


def _at_least(choice: Options, nbytes: float) -> Option | None:
    """The smallest subset that moves so many bytes; None where all move fewer."""
    k = bisect_left(choice, nbytes, key=lambda option: option.nbytes)
    return choice[k] if k < len(choice) else None


def _spread(options: Sequence[Options], need: int) -> list[Option]:
    """Picks a subset for each unit so that at least `need` bytes stream, evenly over the units, and few more.

    Walks the units once and keeps the running sum as close above an even share as the subsets allow (error diffusion,
    as a line is drawn on a grid), then gives back what was taken too much.
    """
    total = sum(choice[-1].nbytes for choice in options)
    if total == 0:
        return [choice[0] for choice in options]
    chosen: list[Option] = []
    moved = share = 0.0
    for choice in options:
        share += choice[-1].nbytes * need / total
        chosen.append(_at_least(choice, share - moved) or choice[-1])
        moved += chosen[-1].nbytes
    for k, choice in enumerate(options):  # rounding up left something to give back
        now = chosen[k].nbytes
        lower = _at_least(choice, need - moved + now)
        if lower is not None and lower.nbytes < now:
            chosen[k], moved = lower, moved - now + lower.nbytes
    missing = need - moved
    for k, choice in enumerate(options):  # rounding down left something to take
        if missing <= 0:
            break
        now = chosen[k].nbytes
        higher = _at_least(choice, now + missing) or choice[-1]
        if higher.nbytes > now:
            chosen[k], missing = higher, missing - (higher.nbytes - now)
    return chosen


def _smallest_capacity(units: Sequence[UnitSpec], slots: int | None) -> int:
    """Bytes that suffice when every tensor that can stream does, through the smallest slots."""
    options = [options_of(u, 0) for u in units]
    sizes = sorted({o.slot for choice in options for o in choice})
    best = sum(t.nbytes for u in units for t in u.tensors if not t.is_table)
    for slot in sizes:
        kept = sum(
            u.nbytes - sum(t.nbytes for t in u.tensors if t.is_table) - max(o.nbytes for o in choice if o.slot <= slot)
            for u, choice in zip(units, options, strict=True)
        )
        best = min(best, kept + depth(slot, slots) * slot)
    return best


def depth(slot_nbytes: int, slots: int | None = None) -> int:
    """Slots of a ring: as asked, else two, or as many as hold `LOOKAHEAD` bytes of work for the disk where they are
    small: the model's thread pauses between passes, and the disk should not."""
    if slots is not None:
        return slots
    return max(2, min(MOST_SLOTS, -(-LOOKAHEAD // max(1, slot_nbytes))))
