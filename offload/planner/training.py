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

The accelerator may make a part of the updates itself (`TrainedShard.goes_up`), while the CPU makes the others. Their
state goes up, is updated, and comes back beside state that goes up. Of a cell with a place both there and in main
memory this part does not cross at all; of others gradients go up or weights come down, as many bytes as otherwise:

    clip          state up; update; state down; forward
    no clip                                          backward; state up; update; state down

With a clip norm all state moves in the forward pass, which is short, and the disk rests in the backward pass. So the
state of a unit may be written there (`defers`), at the price of a second update. A cell that stays keeps its gradient
until then, and the weights for the forward lie aside:

    deferred      read gradient, state; update; forward                read gradient, state; update; write state;
                                                                       backward; write gradient

Weights are read as a copy in the model's dtype, which the update before wrote, or as the float32 masters that the state
begins with, rounded on the way: whichever moves fewer bytes (see `has_copies`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from offload.planner.schedule import Read, Schedule, Step, Write
from offload.planner.training_emitter import Emitter
from offload.planner.training_steps import Backward, Forward, TrainedUnit, What


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
    holds_there: bool = False,
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
        holds_there: what the accelerator updates of cells that rest there has not come down since the last pass.
    """
    made = Emitter()
    deferred = {u.name for u in order[:-1] if is_due and forward and backward and u.defers and may_defer(u)}
    every = [*order, loose] if loose is not None else order
    has_there = {u.name: holds_there and u.rests_there for u in every}  # what is updated there has not come down
    if is_due and loose is not None:
        _update(made, loose, has_there)
    if forward and loose is not None:
        made.upload(loose, "here" if is_due or has_there[loose.name] else "all")
    for unit in order:
        is_last = unit is order[-1] and backward  # its backward follows at once
        if is_due:
            made.bring(unit, "gradient")
            if unit.name in deferred:
                made.try_update(unit)
            else:
                _update(made, unit, has_there)
        elif forward:
            made.bring(unit, reads)
        if forward:
            made.upload(unit, "here" if is_due or has_there[unit.name] else "all")
            if unit.uploads and not is_last:
                made.release(unit)
            made.visit(Forward(index=0, unit=unit.name, nbytes=unit.nbytes), unit, loose)
            if is_due and unit.going_up and unit.stays and not unit.rests_there and not is_last:
                made.download(unit, "there")
            elif not is_last:
                made.leave(unit)
        elif is_due and not unit.rests_there:
            made.download(unit, "there")
        if not (forward and (unit.uploads or is_last)):
            made.release(unit)
    behind: TrainedUnit | None = None  # the unit whose updates there have not been made
    for unit in reversed(order) if backward else ():
        if unit.name in deferred:
            made.bring(unit, "gradient")
            made.update(unit, is_second=True)
            if not unit.stays_there:
                made.upload(unit)
        elif unit is not order[-1]:
            if unit.stays_there:
                made.bring(unit, "nothing")
            else:
                made.bring(unit, "masters" if is_due else reads)
                made.upload(unit)
        if behind is not None:  # what the next backward needs has gone up first
            _update_behind(made, behind, writes_copies)
            behind = None
        made.visit(Backward(index=0, unit=unit.name, nbytes=unit.nbytes), unit, loose)
        if clips:
            made.download(unit, "here" if unit.rests_there else "all")
            made.write(unit, "gradient")
            continue
        made.download(unit, "here", is_last=not unit.going_up)
        made.update(unit)
        if unit.going_up:
            behind = unit
        else:
            _let_go(made, unit, writes_copies)
    if behind is not None:
        _update_behind(made, behind, writes_copies)
    if backward and loose is not None:
        if loose.uploads:
            made.visit(Backward(index=0, unit=loose.name, nbytes=loose.nbytes), loose, None)
            made.download(loose, "here")
        if not clips:
            made.update(loose)
            made.update_there(loose)
    return made.finish()


def _update(made: Emitter, unit: TrainedUnit, has_there: Mapping[str, bool]) -> None:
    """Updates that wait for the norm. Gradients that go up are first, since they need not wait for the CPU."""
    if not has_there[unit.name]:
        made.upload(unit, "there")
    made.update_there(unit)
    made.update(unit)


def _update_behind(made: Emitter, unit: TrainedUnit, writes_copies: bool) -> None:
    """Updates by the accelerator behind a backward, and what then becomes of the cell."""
    made.update_there(unit)
    if not unit.rests_there:
        made.download(unit, "there")
    _let_go(made, unit, writes_copies)


def _let_go(made: Emitter, unit: TrainedUnit, writes_copies: bool) -> None:
    if writes_copies:
        made.write(unit, "weights")
    else:
        made.release(unit)


def may_defer(unit: TrainedUnit) -> bool:
    """Whether some of a unit's state travels, and the CPU makes all of its updates."""
    return not unit.going_up and not all(shard.stays for shard in unit.shards)


def deferring(sizes: Mapping[str, int], share: float) -> frozenset[str]:
    """Units whose state is written in the backward pass: a share of all bytes, spread evenly.

    Args:
        sizes: unit -> bytes of its state, in the order of the forward pass.
    """
    chosen, wanted, taken = set(), 0.0, 0.0
    for unit, nbytes in sizes.items():
        wanted += share * nbytes
        if nbytes and taken + nbytes / 2 <= wanted:
            chosen.add(unit)
            taken += nbytes
    return frozenset(chosen)


def asides(share: float, *, is_beside: bool) -> int:
    """Places for weights of cells that keep their gradients, where a share of the state is deferred.

    Args:
        is_beside: weights go up from there while the next unit is updated.
    """
    return (2 if is_beside else 1) if share else 0


def moved(schedule: Iterable[Step]) -> tuple[int, int]:
    """Bytes that are read from disk and written to it."""
    steps = list(schedule)
    return sum(s.nbytes for s in steps if isinstance(s, Read)), sum(s.nbytes for s in steps if isinstance(s, Write))
