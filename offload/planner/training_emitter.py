"""Writes the schedule of training down step by step, and for each step what it comes after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from offload.planner.schedule import Compute, Download, Read, Release, RingName, Schedule, Step, Upload
from offload.planner.training_steps import (
    Made,
    ReadCell,
    ReadShard,
    TrainedShard,
    TrainedUnit,
    Update,
    What,
    WriteCell,
    WriteShard,
)


class Emitter:
    """Steps one after the other, and who waits for whom: a read for the last change of what it reads."""

    def __init__(self) -> None:
        self._steps: list[Step] = []
        self._changed: dict[str, int] = {}  # shard or cell -> step that changed it last
        self._first: list[tuple[int, tuple[str, ...]]] = []  # reads of what no step before them changed
        self._ready: dict[str, int] = {}  # unit -> step after which its cell is as the next one wants it
        self._there: dict[str, int] = {}  # unit -> the same of its cell on the accelerator

    def add(self, step: Step) -> int:
        self._steps.append(replace(step, index=len(self._steps)))
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
        names = [name for name in (unit.name, loose.name if loose is not None else "") if name in self._there]
        self._there[unit.name] = self.add(replace(step, after=tuple(sorted({self._there[name] for name in names}))))

    def upload(self, unit: TrainedUnit) -> None:
        """Brings a unit's weights to the accelerator."""
        if unit.uploads and unit.shards:
            ring: RingName | None = None if unit.stays_there else "device"
            at = self._read(
                Upload(index=0, unit=unit.name, nbytes=unit.nbytes, ring=ring), [host(unit)], self.ready(unit)
            )
            self._there[unit.name] = self._ready[unit.name] = at

    def leave(self, unit: TrainedUnit) -> None:
        """A unit's weights are not needed on the accelerator for now."""
        if unit.uploads and unit.shards and not unit.stays_there:
            self.add(Release(index=0, unit=unit.name, after=(self._there[unit.name],), ring="device"))

    def download(self, unit: TrainedUnit) -> None:
        """Brings a unit's gradient down, in place of its weights."""
        if unit.uploads and unit.shards:
            after = tuple(sorted({self._there[unit.name], *self.ready(unit), *self._changes([host(unit)])}))
            at = self.add(Download(index=0, unit=unit.name, after=after, nbytes=unit.nbytes))
            self._ready[unit.name] = self._changed[host(unit)] = at
            if not unit.stays_there:
                self.add(Release(index=0, unit=unit.name, after=(at,), ring="device"))

    def bring(self, unit: TrainedUnit, what: What) -> None:
        if unit.stays or not unit.shards:
            return
        if what == "masters":
            read = ReadCell(index=0, unit=unit.name, nbytes=unit.masters_nbytes, ring="cells", what=what)
            at = self._read(read, [s.name for s in unit.shards])
        else:
            read = ReadCell(index=0, unit=unit.name, nbytes=unit.nbytes, ring="cells", what=what)
            at = self._read(read, [unit.name])
        self._ready[unit.name] = at

    def update(self, unit: TrainedUnit, *, is_second: bool = False) -> None:
        """The updates of a unit. The second time, state that is in memory has had its own."""
        for shard in unit.shards:
            done = self._update(unit, shard, "rounding" if is_second and shard.stays else "update")
            self._changed[shard.name] = done
            if unit.uploads:
                if host(unit) not in self._changed:
                    self._first.append((done, (host(unit),)))
                self._changed[host(unit)] = done
            if not shard.stays:
                write = WriteShard(index=0, unit=unit.name, shard=shard.name, after=(done,), nbytes=shard.nbytes)
                self._changed[shard.name] = written = self.add(write)
                self.add(Release(index=0, unit=unit.name, after=(written,), ring="state"))

    def try_update(self, unit: TrainedUnit) -> None:
        """Updates for the weights alone, except of state that is in memory."""
        for shard in unit.shards:
            if shard.stays:
                self._changed[shard.name] = self._update(unit, shard, "update")
                continue
            done = self._update(unit, shard, "trial")
            self.add(Release(index=0, unit=unit.name, after=(done,), ring="state"))

    def write(self, unit: TrainedUnit, what: What) -> None:
        if unit.stays or not unit.shards:
            return
        cell = WriteCell(index=0, unit=unit.name, after=self.ready(unit), nbytes=unit.nbytes, what=what)
        at = self.add(cell)
        self._changed[unit.name] = at
        self._let_go(unit, (at,))

    def release(self, unit: TrainedUnit) -> None:
        if not unit.stays and unit.shards:
            self._let_go(unit, self.ready(unit))

    def _let_go(self, unit: TrainedUnit, after: tuple[int, ...]) -> None:
        """A cell is not in main memory any more. Where several lanes work, the next one to bring it waits for that."""
        at = self.add(Release(index=0, unit=unit.name, after=after, ring="cells"))
        if unit.uploads:
            self._changed[host(unit)] = at

    def finish(self) -> Schedule:
        """A read of what only later steps change follows those of the pass before."""
        for index, names in self._first:
            self._steps[index] = replace(self._steps[index], behind=self._changes(names))
        return tuple(self._steps)

    def _update(self, unit: TrainedUnit, shard: TrainedShard, made: Made) -> int:
        after = self.ready(unit)
        if not shard.stays:
            read = ReadShard(index=0, unit=unit.name, shard=shard.name, nbytes=shard.nbytes, ring="state")
            after = (*after, self._read(read, [shard.name]))
        return self.compute(
            Update(
                index=0, unit=unit.name, shard=shard.name, after=after, nbytes=shard.nbytes, is_beside=unit.uploads,
                made=made,
            )
        )  # fmt: skip

    def _read(self, read: Read | Upload, names: Sequence[str], after: tuple[int, ...] = ()) -> int:
        at = self.add(replace(read, after=tuple(sorted({*after, *self._changes(names)}))))
        if rest := tuple(n for n in names if n not in self._changed):
            self._first.append((at, rest))
        return at

    def _changes(self, names: Sequence[str]) -> tuple[int, ...]:
        return tuple(sorted({self._changed[name] for name in names if name in self._changed}))


def host(unit: TrainedUnit) -> str:
    """What the emitter calls a unit's cell in main memory, beside the name of what is stored of it."""
    return f"{unit.name} in memory"
