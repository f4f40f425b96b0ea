"""What zeroth-order training writes of weights: those that stream, now and then, and those that stay, for commits."""

from __future__ import annotations

from dataclasses import dataclass

from offload.runtime.zeroth import REPLAYED


@dataclass(frozen=True, kw_only=True)
class Copies:
    """Bytes at most.

    Attributes:
        disk_nbytes: that lie in offload_dir at once.
        step_nbytes: written in a step, on average where steps between two copies were named.
        nbytes: written in the whole run; 0 when nobody has counted its steps.
    """

    disk_nbytes: int = 0
    step_nbytes: int = 0
    nbytes: int = 0


NONE = Copies()


def copies(streamed: int, staying: int, *, steps: int, every: int | None) -> Copies:
    """The most that it can be.

    Of what streams there may be three copies: the last commit's, the one that is read, and the one that is written. Of
    what stays, two: the last commit's and the next one's.

    Args:
        streamed, staying: bytes of weights.
        steps: of the run; 0 when nobody has counted.
        every: steps between two copies; None: as it pays, which may be every step.
    """
    of_streamed = (steps - 1) // (every or 1) if steps else 3  # the first step has nothing to write yet
    of_staying = steps // (REPLAYED + 1) if steps else 2
    return Copies(
        disk_nbytes=min(3, of_streamed) * streamed + min(2, of_staying) * staying,
        step_nbytes=streamed // (every or 1) if of_streamed else 0,
        nbytes=of_streamed * streamed + of_staying * staying if steps else 0,
    )
