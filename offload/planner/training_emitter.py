"""Writes the schedule of training down step by step, and for each step what it comes after."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from offload.planner.schedule import Compute, Read, Release, RingName, Schedule, Step, Upload
from offload.planner.training_steps import (
    DownloadCell,
    DownloadShard,
    Made,
    Part,
    ReadCell,
    ReadShard,
    TrainedShard,
    TrainedUnit,
    Update,
    UpdateThere,
    UploadCell,
    UploadShard,
    What,
    WriteCell,
    WriteShard,
)


class Emitter:
    """Steps one after the other, and who waits for whom: a read for the last change of what it reads."""

    def __init__(self) -> None:
        self._steps: list[Step] = []
        self._changed: dict[str, int] = {}  # shard or cell -> step that changed it last
        self._first: list[tuple[int, tuple[str, ...]]] = []  # steps that use what none before them changed
        self._ready: dict[str, int] = {}  # unit -> step after which its cell is as the next one wants it
        self._there: dict[str, tuple[int, ...]] = {}  # unit -> the same of its cell on the accelerator
        self._arriving: set[str] = set()  # units that have something on the accelerator for the next visit
        self._aside: set[str] = set()  # units whose weights are beside their cells

    def add(self, step: Step) -> int:
        object.__setattr__(step, "index", len(self._steps))  # made for this place, and seen by nobody yet
        self._steps.append(step)
        return len(self._steps) - 1

    def compute(self, step: Compute) -> int:
        self._ready[step.unit] = at = self.add(step)
        return at

    def ready(self, unit: TrainedUnit) -> tuple[int, ...]:
        return (self._ready[unit.name],) if unit.name in self._ready else ()

    def visit(self, step: Compute, unit: TrainedUnit, loose: TrainedUnit | None) -> None:
        """A forward or backward. It changes the cell where it computes."""
        if not unit.uploads:
            self.compute(replace(step, after=self.ready(unit)))
            return
        names = [unit.name, loose.name] if loose is not None else [unit.name]
        at = self.add(replace(step, after=_union(self._there.get(name, ()) for name in names)))
        self._there[unit.name], self._changed[_there(unit)] = (at,), at
        self._arriving.discard(unit.name)

    # The accelerator.

    def upload(self, unit: TrainedUnit, part: Part = "all") -> None:
        """Brings a unit's weights to the accelerator, or gradients that it will make into weights."""
        if not (unit.uploads and unit.shards) or (moved := _moved(unit, part)) is None:
            return
        nbytes, shards = moved
        has_slot = unit.stays_there or unit.name in self._arriving
        ring: RingName | None = None if has_slot else "device"
        step = UploadCell(index=0, unit=unit.name, nbytes=nbytes, ring=ring, shards=shards)
        at = self._read(step, _parts(unit, part), self.ready(unit))
        self._there[unit.name] = (*self._there[unit.name], at) if unit.name in self._arriving else (at,)
        self._arriving.add(unit.name)
        if part != "there" or len(shards) == len(unit.shards):
            self._ready[unit.name] = at

    def leave(self, unit: TrainedUnit) -> None:
        """A unit's weights are not needed on the accelerator for now."""
        if unit.uploads and unit.shards and not unit.stays_there:
            self.add(Release(index=0, unit=unit.name, after=self._there[unit.name], ring="device"))

    def download(self, unit: TrainedUnit, part: Part = "all", *, is_last: bool = True) -> None:
        """Brings a unit's gradient down, in place of its weights, or weights in place of gradients.

        Args:
            is_last: the slot that it lay in goes back.
        """
        if not (unit.uploads and unit.shards) or (moved := _moved(unit, part)) is None:
            return
        nbytes, shards = moved
        after = self._there.get(unit.name, ())
        if part == "there":  # the CPU may be at work on the rest
            after = _union([after, self._changes([_room(unit)])])
        else:
            after = _union([after, self.ready(unit), self._changes(_parts(unit, part))])
        at = self.add(DownloadCell(index=0, unit=unit.name, after=after, nbytes=nbytes, shards=shards))
        if part != "there":
            self._ready[unit.name] = at
        if is_last and not unit.stays_there:  # whoever takes the cell up again waits for that, not to be taken for it
            at = self.add(Release(index=0, unit=unit.name, after=(at,), ring="device"))
            self._arriving.discard(unit.name)
        for name in _parts(unit, part):
            self._changed[name] = at

    def update_there(self, unit: TrainedUnit) -> None:
        """The updates that the accelerator makes: state goes up, and comes back beside that of others going up."""
        before = self._there.get(unit.name, ())
        last: tuple[int, ...] = ()
        for shard in unit.going_up:
            after: tuple[int, ...] = ()
            if not shard.stays:
                read = ReadShard(index=0, unit=unit.name, shard=shard.name, nbytes=shard.nbytes, ring="state")
                after = (self._read(read, [shard.name]),)
            what: dict[str, Any] = {"index": 0, "unit": unit.name, "shard": shard.name, "nbytes": shard.nbytes}
            there = self._read(UploadShard(**what, ring="device state"), [shard.name], after)
            done = self.add(UpdateThere(**what, after=(*before, there)))
            if not before:
                self._first.append((done, (_there(unit),)))
            self._changed[shard.name] = back = self.add(DownloadShard(**what, after=(done,)))
            self.add(Release(index=0, unit=unit.name, after=(back,), ring="device state"))
            self._store(unit, shard, back)
            last = (done,)
        if last:
            self._there[unit.name] = (*before, *last)
            self._arriving.add(unit.name)

    # Main memory and disk.

    def bring(self, unit: TrainedUnit, what: What) -> None:
        if unit.stays or not unit.shards:
            return
        if what == "masters":
            read = ReadCell(index=0, unit=unit.name, nbytes=unit.masters_nbytes, ring="cells", what=what)
            at = self._read(read, [s.name for s in unit.shards])
        else:
            read = ReadCell(index=0, unit=unit.name, nbytes=unit.nbytes, ring="cells", what=what)
            at = self._read(read, [unit.name])
        self._ready[unit.name] = self._changed[_room(unit)] = at

    def update(self, unit: TrainedUnit, *, is_second: bool = False) -> None:
        """The updates that the CPU makes. The second time, state that is in memory has had its own."""
        up = frozenset(s.name for s in unit.going_up)
        for shard in unit.shards:
            if shard.name in up:
                continue
            done = self._update(unit, shard, "rounding" if is_second and shard.stays else "update")
            self._changed[shard.name] = done
            self._store(unit, shard, done)

    def try_update(self, unit: TrainedUnit) -> None:
        """Updates for the weights alone, except of state that is in memory. A cell that stays keeps the gradient."""
        if unit.stays:
            self._aside.add(unit.name)
        for shard in unit.shards:
            done = self._update(unit, shard, "update" if shard.stays else "trial")
            if shard.stays:
                self._changed[shard.name] = done
            else:
                self.add(Release(index=0, unit=unit.name, after=(done,), ring="state"))

    def write(self, unit: TrainedUnit, what: What) -> None:
        if unit.stays or not unit.shards:
            return
        cell = WriteCell(index=0, unit=unit.name, after=self._settled(unit), nbytes=unit.nbytes, what=what)
        at = self.add(cell)
        self._changed[unit.name] = at
        self._let_go(unit, (at,))

    def release(self, unit: TrainedUnit) -> None:
        if unit.name in self._aside:
            self._aside.remove(unit.name)
            self._let_go(unit, self.ready(unit), "aside")
        elif not unit.stays and unit.shards:
            self._let_go(unit, self._settled(unit))

    def finish(self) -> Schedule:
        """A read of what only later steps change follows those of the pass before."""
        for index, names in self._first:
            self._steps[index] = replace(self._steps[index], behind=self._changes(names))
        return tuple(self._steps)

    def _let_go(self, unit: TrainedUnit, after: tuple[int, ...], ring: RingName = "cells") -> None:
        """A cell is not there in main memory any more. Where several lanes work, the next to use it waits for that."""
        at = self.add(Release(index=0, unit=unit.name, after=after, ring=ring))
        if unit.uploads:
            for name in _parts(unit, "all"):
                self._changed[name] = at

    def _settled(self, unit: TrainedUnit) -> tuple[int, ...]:
        """Steps after which all of a cell is as the next one wants it, the last one first."""
        there = self._changes([_host_there(unit)]) if unit.going_up else ()
        return _union([self.ready(unit), there])[::-1]

    def _store(self, unit: TrainedUnit, shard: TrainedShard, done: int) -> None:
        """State that does not stay is written when it has changed."""
        if not shard.stays:
            write = WriteShard(index=0, unit=unit.name, shard=shard.name, after=(done,), nbytes=shard.nbytes)
            self._changed[shard.name] = written = self.add(write)
            self.add(Release(index=0, unit=unit.name, after=(written,), ring="state"))

    def _update(self, unit: TrainedUnit, shard: TrainedShard, made: Made) -> int:
        after = {*self.ready(unit), *(self._changes([host(unit)]) if unit.uploads else ())}
        if not shard.stays:
            read = ReadShard(index=0, unit=unit.name, shard=shard.name, nbytes=shard.nbytes, ring="state")
            after.add(self._read(read, [shard.name]))
        done = self.compute(
            Update(
                index=0, unit=unit.name, shard=shard.name, after=tuple(sorted(after)), nbytes=shard.nbytes,
                is_beside=unit.uploads, made=made, goes_aside=unit.name in self._aside,
            )
        )  # fmt: skip
        if unit.uploads:
            if host(unit) not in self._changed:
                self._first.append((done, (host(unit),)))
            self._changed[host(unit)] = done
        return done

    def _read(self, read: Read | Upload, names: Sequence[str], after: tuple[int, ...] = ()) -> int:
        at = self.add(replace(read, after=_union([after, self._changes(names)])))
        if rest := tuple(n for n in names if n not in self._changed):
            self._first.append((at, rest))
        return at

    def _changes(self, names: Sequence[str]) -> tuple[int, ...]:
        return _union([self._changed[name]] for name in names if name in self._changed)


def host(unit: TrainedUnit) -> str:
    """What the emitter calls a unit's cell in main memory, beside the name of what is stored of it."""
    return f"{unit.name} in memory"


def _host_there(unit: TrainedUnit) -> str:
    """The same of the part that the accelerator updates."""
    return f"{unit.name} in memory, updated there"


def _room(unit: TrainedUnit) -> str:
    """The slot that a cell lies in, whatever it holds."""
    return f"{unit.name}, its room"


def _there(unit: TrainedUnit) -> str:
    """A unit's cell on the accelerator."""
    return f"{unit.name} there"


def _parts(unit: TrainedUnit, part: Part) -> list[str]:
    """The names of what a part of a cell in main memory is."""
    if not unit.going_up:
        return [host(unit)]
    return {"all": [host(unit), _host_there(unit)], "here": [host(unit)], "there": [_host_there(unit)]}[part]


def _moved(unit: TrainedUnit, part: Part) -> tuple[int, tuple[str, ...]] | None:
    """Bytes and shards of a part of a cell; no shards: the whole; None: the part is empty."""
    up = unit.going_up
    if part == "all" or (part == "here" and not up):
        return unit.nbytes, ()
    chosen = up if part == "there" else tuple(s for s in unit.shards if not s.goes_up)
    return (sum(s.cell_nbytes for s in chosen), tuple(s.name for s in chosen)) if chosen else None


def _union(groups: Iterable[Iterable[int]]) -> tuple[int, ...]:
    return tuple(sorted({k for group in groups for k in group}))
