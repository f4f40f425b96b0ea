"""The schedule of training: one step over the model, forward and backward, as a tuple of small frozen steps.

With a clip norm, the factor is known only when the last gradient is, so a unit is updated just before its next use, in
the forward pass of the next step. Without one, it is updated in the backward pass. What lies in cells that do not stay
in memory, and in state that does not, travels:

                  forward                                              backward
    clip          read gradient, state; update; write state; forward   read masters; backward; write gradient
    no clip       read weights; forward                                read weights, state; backward; update; write both

On an accelerator, the weights of a unit go up for each visit, its gradient comes down, and updates run beside:

    clip          update; upload; forward            upload; backward; download
    no clip       upload; forward                    upload; backward; download; update

With a clip norm all state moves in the forward pass, which is short, and the disk rests in the backward pass. So the
state of a cell that travels may be written there (`defers`), at the price of a second update:

    deferred      read gradient, state; update; forward                read gradient, state; update; write state;
                                                                       backward; write gradient

Weights are read as a copy in the model's dtype, which the update before wrote, or as the float32 masters that the state
begins with, rounded on the way: whichever moves fewer bytes (see `has_copies`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from offload.planner.schedule import Compute, Download, Read, Release, RingName, Schedule, Step, Upload, Write

What = Literal["gradient", "weights", "masters", "nothing"]
Made = Literal["update", "trial", "rounding"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadShard(Read):
    """Reads the optimizer's state of a shard; takes a slot of the state's ring."""

    shard: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadCell(Read):
    """Brings a unit's gradient or weights, or takes room for what will come; takes a slot of the cells' ring."""

    what: What


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward(Compute):
    """The forward of the unit, of all micro-batches. If it is the pass's last, its cell stays for the backward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backward(Compute):
    """The backward of the unit, of all micro-batches: the gradient takes the place of the weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Update(Compute):
    """The optimizer's step of one shard: gradient and state become weights and state.

    Attributes:
        made: "trial": only the weights are wanted, and the slot with the state is dropped, since the update will be
            made again; "rounding": the state is up to date, and the weights are made of it.
    """

    shard: str
    made: Made = "update"


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteShard(Write):
    """Writes the state of a shard back."""

    shard: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteCell(Write):
    """Writes a unit's gradient, or its weights."""

    what: What


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedShard:
    """What the optimizer updates at a time.

    Attributes:
        nbytes: of its state.
        masters_nbytes: of the part of it that holds the float32 weights.
        stays: the state is kept in memory.
    """

    name: str
    nbytes: int
    masters_nbytes: int
    stays: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedUnit:
    """A unit, or what belongs to none.

    Attributes:
        nbytes: of its cell: of its weights, and of its gradient.
        stays: the cell is kept in memory.
        uploads: it computes on an accelerator with memory of its own.
        stays_there: and has a place of its own there, from its forward to its backward.
        defers: its state is written in the backward pass where updates wait for the forward pass, if it travels.
    """

    name: str
    nbytes: int
    shards: tuple[TrainedShard, ...] = ()
    stays: bool = True
    uploads: bool = False
    stays_there: bool = False
    defers: bool = False

    @property
    def masters_nbytes(self) -> int:
        """What reading its masters moves."""
        return sum(s.masters_nbytes for s in self.shards if not s.stays)


def has_copies(clips: bool, itemsize: int) -> bool:
    """Whether weights are best stored a second time, in the model's dtype.

    Without clipping, weights are used twice between two updates: a copy costs a write and two reads of `itemsize` bytes
    a parameter; the masters, two reads of 4. With it they are used once more after the update, so that a write and a
    read of a copy move no less than one read of masters, and wear the disk.
    """
    return not clips and 3 * itemsize < 8


def emit_training(
    order: Sequence[TrainedUnit],
    loose: TrainedUnit | None,
    *,
    clips: bool,
    is_due: bool = False,
    reads: What = "masters",
    writes_copies: bool = False,
    forward: bool = True,
    backward: bool = True,
) -> Schedule:
    """The steps of one step of training, or of a part of it.

    Args:
        order: units in the order of the forward pass.
        loose: parameters of no unit, which stay in memory.
        clips: whether updates wait for the next forward pass.
        is_due: gradients of the last step wait to be applied.
        reads: where the weights of cells that travel are, while no update is due.
        writes_copies: weights are written after an update in the backward pass.
        forward, backward: what is run; neither: only the updates that are due.
    """
    made = _Emitter()
    deferred = [u for u in order[:-1] if is_due and forward and backward and u.defers and not (u.stays or u.uploads)]
    if is_due and loose is not None:
        made.update(loose)
    if forward and loose is not None:
        made.upload(loose)
    for unit in order:
        is_last = unit is order[-1] and backward  # its backward follows at once
        if is_due:
            made.bring(unit, "gradient")
            if unit in deferred:
                made.try_update(unit)
            else:
                made.update(unit)
        elif forward:
            made.bring(unit, reads)
        if forward:
            made.upload(unit)
            if unit.uploads and not is_last:
                made.release(unit)
            made.visit(Forward(index=0, unit=unit.name, nbytes=unit.nbytes), unit, loose)
            if not is_last:
                made.leave(unit)
        if not (forward and (unit.uploads or is_last)):
            made.release(unit)
    for unit in reversed(order) if backward else ():
        if unit in deferred:
            made.bring(unit, "gradient")
            made.update(unit, is_second=True)
        elif unit is not order[-1]:
            if unit.stays_there:
                made.bring(unit, "nothing")
            else:
                made.bring(unit, "masters" if is_due else reads)
                made.upload(unit)
        made.visit(Backward(index=0, unit=unit.name, nbytes=unit.nbytes), unit, loose)
        made.download(unit)
        if clips:
            made.write(unit, "gradient")
            continue
        made.update(unit)
        if writes_copies:
            made.write(unit, "weights")
        else:
            made.release(unit)
    if backward and loose is not None:
        if loose.uploads:
            made.visit(Backward(index=0, unit=loose.name, nbytes=loose.nbytes), loose, None)
            made.download(loose)
        if not clips:
            made.update(loose)
    return made.finish()


def moved(schedule: Iterable[Step]) -> tuple[int, int]:
    """Bytes that are read from disk and written to it."""
    steps = list(schedule)
    return sum(s.nbytes for s in steps if isinstance(s, Read)), sum(s.nbytes for s in steps if isinstance(s, Write))


class _Emitter:
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
                Upload(index=0, unit=unit.name, nbytes=unit.nbytes, ring=ring), [_host(unit)], self.ready(unit)
            )
            self._there[unit.name] = self._ready[unit.name] = at

    def leave(self, unit: TrainedUnit) -> None:
        """A unit's weights are not needed on the accelerator for now."""
        if unit.uploads and unit.shards and not unit.stays_there:
            self.add(Release(index=0, unit=unit.name, after=(self._there[unit.name],), ring="device"))

    def download(self, unit: TrainedUnit) -> None:
        """Brings a unit's gradient down, in place of its weights."""
        if unit.uploads and unit.shards:
            after = tuple(sorted({self._there[unit.name], *self.ready(unit), *self._changes([_host(unit)])}))
            at = self.add(Download(index=0, unit=unit.name, after=after, nbytes=unit.nbytes))
            self._ready[unit.name] = self._changed[_host(unit)] = at
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
                if _host(unit) not in self._changed:
                    self._first.append((done, (_host(unit),)))
                self._changed[_host(unit)] = done
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
            self._changed[_host(unit)] = at

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


def _host(unit: TrainedUnit) -> str:
    """What the emitter calls a unit's cell in main memory, beside the name of what is stored of it."""
    return f"{unit.name} in memory"
