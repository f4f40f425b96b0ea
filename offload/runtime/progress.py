"""How far each lane of training is in the step tuple: what others wait for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from offload.io.buffers import Interrupted
from offload.planner.schedule import Release, Schedule, Step, Write, lane_of
from offload.planner.training_steps import WriteShard

MODEL = "compute"  # the model's own thread


class Progress:
    """Shared by all lanes of a pass, and guarded by `changed`.

    A lane does its steps in order, so where it is says which of them are done: those before it. Writes are done when
    they have begun (a read of the same bytes waits for them), and so are reads: whoever needs the bytes takes them.

    Attributes:
        changed: notified whenever anything here changes.
        number: of the pass that the model is in.
        in_order: nothing overlaps: a step begins when the one before it in the tuple is done. To compare with.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.number = 0
        self.failure: BaseException | None = None
        self.is_stopping = False
        self.in_order = False
        self._lanes: list[str] = []
        self._here: dict[str, tuple[int, int]] = {}

    def start(self, schedule: Schedule, at: int, *, splits: bool) -> None:
        """All lanes begin a pass; those of the pass before are over.

        Args:
            at: the model's first step; those before it are done.
            splits: lanes do their own steps; otherwise the model does all but reads.
        """
        with self.changed:
            self.number += 1
            self._lanes = lanes(schedule) if splits else [MODEL] * len(schedule)
            self._here = dict.fromkeys(self._lanes, (self.number, 0)) | {MODEL: (self.number, at)}
            self.changed.notify_all()

    def again(self) -> None:
        """The model begins the same pass once more, which the others may have begun already."""
        with self.changed:
            self.number += 1
            self._here[MODEL] = (self.number, 0)
            self.changed.notify_all()

    def move(self, lane: str, number: int, at: int) -> None:
        """All steps of a lane before this one are done."""
        with self.changed:
            self._here[lane] = (number, at)
            self.changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """A lane has ended with an error."""
        with self.changed:
            self.failure = self.failure or error
            self.changed.notify_all()

    def are_done(self, step: Step, number: int) -> bool:
        """Whether the steps that this one comes after are, in that pass. The caller holds `changed`."""
        if self.in_order and not self._is_reached(number, step.index):
            return False
        return all(self._is_done(number, k) for k in step.after) and all(
            self._is_done(number - 1, k) for k in step.behind
        )

    def wait(self, step: Step, number: int, *, is_ahead: bool) -> None:
        """Waits, in a lane, until a step may begin.

        Args:
            is_ahead: it may do so before the model has begun the pass.

        Raises:
            Interrupted: lanes are stopping.
        """
        with self.changed:
            self.changed.wait_for(
                lambda: self.is_stopping or (self.are_done(step, number) and (is_ahead or self.number >= number))
            )
            if self.is_stopping:
                raise Interrupted("the lane is stopping")

    def wait_turn(self, step: Step) -> None:
        """Waits, in the model's thread, until a visit may begin, where nothing overlaps."""
        if self.in_order:
            self.wait_model(lambda: self._is_reached(self.number, step.index))

    def wait_model(self, is_there: Callable[[], bool]) -> None:
        """Waits, in the model's thread. Raises what a lane failed with."""
        with self.changed:
            self.changed.wait_for(lambda: is_there() or self.failure is not None)
            if not is_there():
                assert self.failure is not None
                raise self.failure

    def wait_done(self, indices: Sequence[int]) -> None:
        """Waits, in the model's thread, until steps of this pass are done."""
        self.wait_model(lambda: all(self._is_done(self.number, k) for k in indices))

    def finish(self, size: int) -> None:
        """The model has done its part of a pass of so many steps: waits until all lanes have done theirs."""

        def is_over() -> bool:
            return all(here >= (self.number, size) for lane, here in self._here.items() if lane not in ("", "read"))

        self.wait_model(is_over)

    def _is_done(self, number: int, index: int) -> bool:
        lane = self._lanes[index]
        return lane == "read" or (number, index) < self._here[lane]

    def _is_reached(self, number: int, index: int) -> bool:
        """Whether the step before this one has been done, and so all before it."""
        return index == 0 or (number, index - 1) < self._here[self._lanes[index - 1]]


def lanes(schedule: Schedule) -> list[str]:
    """Of each step, the lane that does it on an accelerator. A slot goes back in the lane that has used it."""
    found: list[str] = []
    for step in schedule:
        if isinstance(step, Release):
            found.append(found[step.after[0]])
        elif isinstance(step, WriteShard):
            found.append(found[step.after[0]])  # the lane that has changed it, or brought it down
        elif isinstance(step, Write):
            found.append("update")
        else:
            found.append(lane_of(step))
    return found
