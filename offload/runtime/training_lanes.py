"""The lanes of training: threads that walk the step tuple beside the model, each doing steps of its own kind.

    read lane        wait for what a read comes after, lease a slot, start it     as far ahead as rings have slots
    model's thread   take what arrived, change it in place, give it               the slot goes back when its write ends

On an accelerator there are more lanes, which do in threads of their own what the model's thread does otherwise (see
`runtime/beside.py`). A pass that repeats is walked on beyond its end, into the next one. When another one begins, what
was read ahead is dropped: nothing of it was changed.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from offload.errors import OffloadError, TrainingError
from offload.io.buffers import BufferPool, Interrupted
from offload.planner.schedule import Schedule, Step, Upload
from offload.runtime.kept_state import KeptState
from offload.runtime.progress import MODEL, Progress, lanes
from offload.runtime.timeline import Timeline
from offload.runtime.training_reads import TrainingReads
from offload.runtime.training_rings import TrainingRings
from offload.runtime.training_writes import TrainingWrites
from offload.tiers.cells import Cells
from offload.tiers.spill import Spill
from offload.tiers.statefile import StateFile

LOOSE = "(loose)"
DOING = {"read": "reading", "upload": "uploading", "update": "updating", "download": "downloading",
         "aside": "updating on the accelerator"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Lane:
    """A thread that does some steps of every pass.

    Attributes:
        name: of the lane, see `planner.schedule.lane_of`.
        run: does a step, when what it comes after is done.
        is_ahead: it may begin the next pass before the model does.
    """

    name: str
    run: Callable[[Step], None]
    is_ahead: bool


class TrainingLanes:
    """Belongs to the model's thread. Shards that are kept in memory, and cells that are, do not pass here.

    Args:
        state, spill: where shards and cells are stored.
        cells: how cells lie.
        slots: depth of the ring of shards.
        timeline: receives spans and stalls.

    Attributes:
        nbytes: shard -> bytes of its state.
        rings, kept: the memory that lanes work in, and the state that stays.
        reads, writes: what is on its way from disk and to it.
        progress: how far each lane is.
    """

    def __init__(self, state: StateFile, spill: Spill, cells: Cells, slots: int, timeline: Timeline) -> None:
        self._state, self._spill = state, spill
        self.nbytes = {s.name: state.nbytes(s.name) for cell in cells.layouts.values() for s in cell.shards}
        depth = max(1, min(slots, len(self.nbytes)))
        self.rings = TrainingRings(depth, max(self.nbytes.values(), default=0), cells.pins)
        self.kept = KeptState(state, self.nbytes, cells.pins)
        self.progress = Progress()
        self.reads = TrainingReads(state, spill, cells, self.rings, self.kept, self.progress, timeline)
        self.writes = TrainingWrites(state, spill, cells, self.rings, timeline)
        self._lanes = [Lane("read", self.reads.start, is_ahead=True)]
        self._pools: Sequence[BufferPool] = ()
        self._drop: Callable[[], None] = lambda: None
        self._schedule: Schedule = ()
        self._repeats = False
        self._threads: list[threading.Thread] = []

    def split(self, beside: Sequence[Lane], pools: Sequence[BufferPool], drop: Callable[[], None]) -> None:
        """Lanes do from now on what the model's thread did.

        Args:
            pools: other rings in whose slots they work.
            drop: gives back what they have prepared and nobody will take.
        """
        self._lanes += beside
        self._pools, self._drop = pools, drop

    def pin(self, names: Collection[str]) -> None:
        """The state of these shards crosses a link from now on. None is kept yet."""
        self.kept.pin(names)
        if names:
            self.rings.pin_state()

    @property
    def is_running(self) -> bool:
        """Whether lanes are at work, or wait for the next pass."""
        return bool(self._threads)

    @property
    def ring_nbytes(self) -> int:
        """Of all memory that lanes work in."""
        return self.rings.nbytes + self.reads.nbytes

    # Passes.

    def begin(self, schedule: Schedule, *, repeats: bool, at: int = 0) -> None:
        """The model begins a pass.

        Args:
            repeats: the same pass is likely to come next.
            at: the step to begin with; one before it is done.
        """
        if schedule is self._schedule and self._repeats and at == 0 and self._threads:
            self.progress.again()
            return
        self.rest()
        self._schedule, self._repeats = schedule, repeats
        self.progress.start(schedule, at, splits=len(self._lanes) > 1)
        names = lanes(schedule)
        for lane in self._lanes:
            steps = [step for step, name in zip(schedule, names, strict=True) if name == lane.name]
            if steps:
                run = (lane, steps, self.progress.number, at)
                thread = threading.Thread(target=self._walk, args=run, name=f"offload-{lane.name}", daemon=True)
                self._threads.append(thread)
                thread.start()

    def done(self, at: int) -> None:
        """The model's steps before this one are done, or, if they are writes, have begun."""
        self.progress.move(MODEL, self.progress.number, at)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """What the model's thread fails with behind the failure of a lane follows from it: raises the lane's."""
        try:
            yield
        except Exception as error:
            failure = self.progress.failure
            if failure is None or failure is error:
                raise
            raise failure from error

    def rest(self) -> None:
        """Stops all lanes and gives back what was read ahead. Raises what a lane failed with."""
        if not self._threads:
            return
        progress = self.progress
        with progress.changed:
            progress.is_stopping = True
            progress.changed.notify_all()
        pools = [*self.rings.pools, *self.reads.pools, *self._pools]
        for pool in pools:
            pool.interrupt()
        for thread in self._threads:
            thread.join()
        self.reads.drop()
        try:
            self._drop()
        finally:  # an accelerator that has failed may say so again
            for pool in pools:
                pool.resume()
            self._threads.clear()
            self._schedule = ()
            with progress.changed:
                progress.is_stopping = False
                failure, progress.failure = progress.failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Stops all lanes, waits for what is in flight and frees the memory."""
        with contextlib.suppress(Exception):  # whoever needed the bytes was told, or nobody needs them any more
            self.rest()
        self.reads.close()
        self._state.drain()
        self._spill.close()
        self.kept.close()
        self.rings.close()

    def _walk(self, lane: Lane, steps: Sequence[Step], number: int, at: int) -> None:
        """A lane: its steps in order; in the first pass only those from `at` on, and what every visit needs."""
        first, size, progress = number, len(self._schedule), self.progress
        try:
            while number == first or self._repeats:
                for step in steps:
                    always = isinstance(step, Upload) and step.unit == LOOSE
                    if number > first or step.index >= at or always:
                        progress.wait(step, number, is_ahead=lane.is_ahead)
                        _do(lane, step)
                    progress.move(lane.name, number, step.index + 1)
                progress.move(lane.name, number, size)
                number += 1
        except Interrupted:
            return
        except BaseException as error:
            progress.fail(error)


def _do(lane: Lane, step: Step) -> None:
    """One step. Raises a TrainingError that names it, where what went wrong does not say so itself."""
    try:
        lane.run(step)
    except OffloadError:
        raise
    except Exception as error:
        shard = getattr(step, "shard", None)
        what = f"the state of {shard}" if shard is not None else step.unit
        raise TrainingError(f"{DOING[lane.name]} {what} failed: {type(error).__name__}: {error}") from error
