"""The rings of training in main memory, in whose slots shards of state and cells take turns."""

from __future__ import annotations

from collections.abc import Sequence

from offload.io.buffers import BufferPool
from offload.tiers.pins import Pins


class TrainingRings:
    """Changes between passes only, but for its leases.

    Args:
        slots, nbytes: depth of the ring of state, and bytes of a slot.
        pins: pin what crosses a link.

    Attributes:
        state: for shards that do not stay.
        cells: for cells that do not stay; None: all do.
        aside: for weights of cells that keep their gradients; None: no cell does.
    """

    def __init__(self, slots: int, nbytes: int, pins: Pins) -> None:
        self._pins = pins
        self.state = BufferPool(slots, nbytes)
        self.state.buffer.touch()  # what the first step takes is measured, and it need not use every slot
        self.cells: BufferPool | None = None
        self.aside: BufferPool | None = None
        self._crosses = False  # state does

    def pin_state(self) -> None:
        """State crosses a link from now on."""
        self._crosses = True
        self._pins.add(self.state.buffer)

    def use_cells(self, slots: int, nbytes: int) -> None:
        """Makes the ring of cells, in place of the one before."""
        self._end(self.cells)
        self.cells = self._made(slots, nbytes) if slots else None

    def use_aside(self, slots: int, nbytes: int) -> None:
        """Makes the ring of weights aside, where there is none yet."""
        if self.aside is None and slots:
            self.aside = self._made(slots, nbytes)

    @property
    def pools(self) -> Sequence[BufferPool]:
        """All of them."""
        return [pool for pool in (self.state, self.cells, self.aside) if pool is not None]

    @property
    def nbytes(self) -> int:
        """Of all of them."""
        return sum(pool.buffer.nbytes for pool in self.pools)

    def close(self) -> None:
        """Frees the memory. Nothing is in flight."""
        if self._crosses:
            self._pins.remove(self.state.buffer)
        self.state.close()
        self._end(self.aside)
        self._end(self.cells)

    def _made(self, slots: int, nbytes: int) -> BufferPool:
        pool = BufferPool(slots, nbytes)
        pool.buffer.touch()
        self._pins.add(pool.buffer)
        return pool

    def _end(self, pool: BufferPool | None) -> None:
        if pool is not None:
            self._pins.remove(pool.buffer)
            pool.close()
