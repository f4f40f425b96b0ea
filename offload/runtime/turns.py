"""Several micro-batches through one model, a unit at a time: a thread for each, of which one runs at once.

A model's forward is a function that calls its units one after the other. To let every micro-batch pass a unit before
any enters the next, the thread of a micro-batch pauses where it would enter, and the next one's goes on:

    thread 0   embed          | block 0          | block 1           ...
    thread 1          embed   |         block 0  |         block 1   ...
               turn 0           turn 1             turn 2

So a unit's weights are needed once in a forward and once in a backward pass, however many micro-batches there are, and
its gradient is complete when the last of them has left.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence


class Abandoned(Exception):
    """Another thread failed: this one has to end too."""


class Turns:
    """Who runs: (turn, participant), counted up in that order."""

    def __init__(self, participants: int) -> None:
        self._count = participants
        self._at = (0, 0)
        self._failed = False
        self._changed = threading.Condition()

    def begin(self, participant: int) -> None:
        """Waits for this participant's first turn."""
        self._wait((0, participant))

    def next(self, participant: int) -> None:
        """Ends this participant's turn and waits for its next one."""
        turn = self._at[0]
        self.end(participant)
        self._wait((turn + 1, participant))

    def end(self, participant: int) -> None:
        """Ends this participant's turn."""
        with self._changed:
            if not self._failed:
                assert self._at[1] == participant, (self._at, participant)
                turn, _ = self._at
                self._at = (turn, participant + 1) if participant + 1 < self._count else (turn + 1, 0)
            self._changed.notify_all()

    def fail(self) -> None:
        """Makes every other participant raise Abandoned."""
        with self._changed:
            self._failed = True
            self._changed.notify_all()

    def is_first(self) -> bool:
        """Whether the running participant is the first of its turn."""
        return self._at[1] == 0

    def is_last(self) -> bool:
        """Whether it is the last."""
        return self._at[1] == self._count - 1

    def _wait(self, at: tuple[int, int]) -> None:
        with self._changed:
            while self._at != at:
                if self._failed:
                    raise Abandoned
                self._changed.wait()
            if self._failed:
                raise Abandoned


def run(bodies: Sequence[Callable[[int], None]], turns: Turns) -> None:
    """Runs every body with its number, each in a thread of its own; a single one in this thread.

    Raises:
        The first error of a body, when all have ended.
    """
    errors: list[BaseException] = []

    def body(number: int) -> None:
        try:
            turns.begin(number)
            bodies[number](number)
            turns.end(number)
        except Abandoned:
            return
        except BaseException as error:
            errors.append(error)
            turns.fail()

    if len(bodies) == 1:
        body(0)
    else:
        threads = [threading.Thread(target=body, args=(n,), name=f"offload-micro-{n}") for n in range(len(bodies))]
        started: list[threading.Thread] = []
        try:
            for thread in threads:
                thread.start()
                started.append(thread)
            for thread in threads:
                thread.join()
        except BaseException:  # an interrupt of the caller's thread, or no room for one more
            turns.fail()
            for thread in started:
                thread.join()
            raise
    if errors:
        raise errors[0]
