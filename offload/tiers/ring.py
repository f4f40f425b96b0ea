"""Memory that is lent in turn: runs of any length, taken at the front and given back at the end, touched once."""

from __future__ import annotations

from collections import deque

from offload.io.buffers import Buffer
from offload.io.extents import ALIGNMENT


class Ring:
    """A region in huge pages that lends runs of itself, each in one piece and from a page boundary on.

        | free | oldest run | ... | newest run | free |        what follows the newest may start over at the front

    Args:
        nbytes: the longest run that will be asked for, and what else shall be out at the same time.
    """

    def __init__(self, nbytes: int) -> None:
        self._buffer = Buffer(-(-max(nbytes, 1) // ALIGNMENT) * ALIGNMENT)
        self._runs: deque[tuple[int, int]] = deque()  # where each begins and ends

    def take(self, nbytes: int) -> memoryview | None:
        """A run of any content; None while it does not fit beside those that are out."""
        nbytes = -(-max(nbytes, 1) // ALIGNMENT) * ALIGNMENT
        assert nbytes <= self._buffer.nbytes, (nbytes, self._buffer.nbytes)
        begin, limit = 0, self._buffer.nbytes
        if self._runs:
            oldest, newest = self._runs[0][0], self._runs[-1][1]
            if newest > oldest and limit - newest >= nbytes:
                begin = newest
            else:
                begin, limit = (0, oldest) if newest > oldest else (newest, oldest)
        if begin + nbytes > limit:
            return None
        self._runs.append((begin, begin + nbytes))
        return self._buffer.view[begin : begin + nbytes]

    def give_back(self) -> None:
        """Ends the loan of the oldest run."""
        self._runs.popleft()

    def close(self) -> None:
        """Gives the memory back, once nobody holds a run."""
        self._buffer.close()
