"""When weights that stream are written back with their updates in them, so that fewer are applied as they load.

With k updates in the log since the last time, a pass makes k directions for every weight that streams. So the seconds
that this has taken since then grow with the square of k, and once they come to what writing takes, it is time: at most
twice the cost of the best moment, whatever the rates are (as one decides when to buy and when to rent skis).
"""

from __future__ import annotations

GUESS = 1e9  # bytes a second that a disk takes, before it has been seen


class WriteBack:
    """Decides before each pass.

    Args:
        nbytes: of the weights that stream.
        every: so many steps, whatever they cost; None: as reckoned.
    """

    def __init__(self, nbytes: int, every: int | None = None) -> None:
        self._nbytes, self._every = nbytes, every
        self._rate = GUESS
        self._spent_s = 0.0
        self._longest_s = 0.0

    def is_due(self, updates: int) -> bool:
        """Whether the pass that is about to run should write back.

        Args:
            updates: how many it has to apply.
        """
        if not self._nbytes or not updates:
            return False
        if self._every is not None:
            return updates >= self._every
        return self._spent_s + self._longest_s >= self._nbytes / self._rate

    def add_pass(self, apply_s: float) -> None:
        """A pass took so many seconds to apply updates of weights that stream."""
        self._spent_s += apply_s
        self._longest_s = apply_s

    def add_writes(self, seconds: float) -> None:
        """What was due has been written, which kept the disk busy for so long."""
        self._spent_s = self._longest_s = 0.0
        if seconds > 0:
            self._rate = self._nbytes / seconds
