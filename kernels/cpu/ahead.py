"""Asks memory for weights in the order in which they lie, whatever the order in which a kernel uses them.

Processors notice by themselves that a long row is read on and on. Four rows of 1.5 KB side by side, or two planes by
turns, they do not follow; a kernel that asks 8 KiB ahead then runs up to 1.8 times as fast.
"""

from __future__ import annotations

from offload.kernels.cpu.helper import helper
from offload.kernels.cpu.memory import prefetch

AHEAD = 8192  # bytes


@helper
def ask(address: int, nbytes: int) -> None:
    """Asks for what lies AHEAD of `nbytes` (a multiple of 64) at `address`; it need not exist."""
    for start in range(0, nbytes, 64):
        prefetch(address + AHEAD + start)
