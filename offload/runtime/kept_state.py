"""The optimizer state that stays in memory: read once, changed in place, written for a commit only."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from offload.io.buffers import Buffer
from offload.tiers.pins import Pins
from offload.tiers.statefile import StateFile


class KeptState:
    """Args:
        state: where shards are stored.
        nbytes: shard -> bytes of its state; all shards, in order.
        pins: pin what crosses a link.

    Attributes:
        views: shard -> its state, of those that stay.
        dirty: those of them that were changed and not written since.
    """

    def __init__(self, state: StateFile, nbytes: Mapping[str, int], pins: Pins) -> None:
        self._state, self._nbytes, self._pins = state, nbytes, pins
        self.views: dict[str, memoryview] = {}
        self.dirty: set[str] = set()
        self._crossing: frozenset[str] = frozenset()
        self._pinned: list[Buffer] = []

    def pin(self, names: Collection[str]) -> None:
        """The state of these shards crosses a link from now on. None is kept yet."""
        assert not self.views
        self._crossing = frozenset(names)

    def keep(self, name: str) -> None:
        """Reads a shard that stays in memory from now on. No pass is under way."""
        buffer = Buffer(self._nbytes[name])
        self._state.read(name, buffer.view).result()
        self._state.verify(name, buffer.view)
        self.views[name] = buffer.view
        if name in self._crossing:
            self._pinned.append(buffer)
            self._pins.add(buffer)

    def drop(self, name: str, generation: int) -> None:
        """A shard that stays no more is written if it was changed. Nothing crosses a link; no pass is under way."""
        assert not self._crossing
        if name in self.dirty:
            self._state.write(name, self.views[name], generation).result()
            self.dirty.discard(name)
        del self.views[name]

    def write(self, generation: int) -> None:
        """Begins writing what was changed."""
        for name in [n for n in self._nbytes if n in self.dirty]:
            self._state.write(name, self.views[name], generation)
            self.dirty.discard(name)

    def close(self) -> None:
        """Nothing crosses any more."""
        for buffer in self._pinned:
            self._pins.remove(buffer)
        self._pinned.clear()
