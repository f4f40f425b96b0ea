"""The files that zeroth-order weights were written back to: which parameter lies in which, and when a file may go."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from offload.io.engine import Engine
from offload.kernels.chosen import Kernels
from offload.runtime.streams import Streams
from offload.tiers.images import Base, Images
from offload.tiers.logfile import LogFile
from offload.units import format_bytes

STAYING = "(staying)"


class Bases:
    """Where each parameter is loaded from: the checkpoint, or a base that holds it as of a step.

    Args:
        names: of the parameters.
        state: the log and the bases of the last commit.
        streams: reads weights that travel, and holds those that stay.
        engine: writes.
        kernels: for checksums.
        disk_limit: bytes that weights may take in the log's folder; None: what is free.
        fallbacks: gets a sentence if weights cannot be written back.

    Attributes:
        images: what the pass that is running writes back to, if it does.
    """

    def __init__(
        self,
        names: Iterable[str],
        state: LogFile,
        streams: Streams,
        engine: Engine,
        kernels: Kernels,
        disk_limit: int | None,
        fallbacks: list[str],
    ) -> None:
        self._state, self._streams, self._engine, self._kernels = state, streams, engine, kernels
        self._disk_limit, self._fallbacks = disk_limit, fallbacks
        self._stored = dict.fromkeys(names, ("", 0))  # parameter -> its base, if not the checkpoint, and its updates
        for base in state.bases:
            self._stored |= dict.fromkeys(base.places, (base.file, base.step))
        self._bases = {base.file: base for base in state.bases}
        self.images: Images | None = None
        self._current: Images | None = None  # what was written back last, while something is read from it

    def steps(self) -> dict[str, int]:
        """Parameter -> the updates that it has where it is loaded from."""
        return {name: step for name, (_, step) in self._stored.items()}

    def lacking(self, names: Sequence[str]) -> int:
        """Updates that a run which goes on would apply to the parameter that lacks the most."""
        return len(self._state.log) - min((self._stored[n][1] for n in names), default=0)

    def has_room(self, nbytes: int) -> bool:
        """Whether weights may be written; without it the log goes on growing, and with it what is applied."""
        if self._disk_limit is None or self._state.taken_nbytes() + nbytes <= self._disk_limit:
            return True
        reason = f"weights were not written back for want of room: disk_limit={format_bytes(self._disk_limit)}"
        self._fallbacks += [reason] if reason not in self._fallbacks else []
        return False

    def image_sizes(self) -> dict[str, int]:
        """Unit that travels -> bytes of its image."""
        return {unit: self._streams.store.image_nbytes(unit) for unit in self._streams.travelling}

    def begin(self) -> None:
        """The pass that is about to run writes back what travels."""
        self.images = self._new(self.image_sizes())

    def end(self) -> tuple[Base, float]:
        """What travels is read from the new file from now on. Returns its base, and the seconds that writing took."""
        images, self.images = self.images, None
        assert images is not None
        base, store = images.finish(), self._streams.store
        self._streams.pause()
        for unit in self._streams.travelling:
            store.reread(unit, images.file, images.offsets[unit])
        self._take(base)
        self._current = images
        return base, images.write_s

    def write_staying(self, names: Sequence[str]) -> None:
        """Weights that stay, which must have their updates, are written too: a run that goes on need not apply the
        whole log to them."""
        store = self._streams.store
        area, nbytes = store.arena.buffer, store.arena.used_nbytes
        places = {n: store.kept(n).data_ptr() - area.address for n in names}
        images = self._new({STAYING: nbytes})
        try:
            images.write(STAYING, area.view[:nbytes], places)
            images.wait(STAYING)
            images.sync()
        except BaseException:
            images.abandon()
            raise
        images.file.close()
        self._take(images.finish())

    def sync(self) -> None:
        """What was written back is on the disk when this returns."""
        if self._current is not None:
            self._current.sync()

    def commit(self, extra: Mapping[str, Any]) -> None:
        """Makes the present step, and what is written, the one that a later run finds."""
        found = []
        for file, base in self._bases.items():
            places = {n: at for n, at in base.places.items() if self._stored[n][0] == file}
            if places:
                found.append(replace(base, places=places))
        self._state.commit(extra, found)
        self._bases = {base.file: base for base in found}

    def close(self) -> None:
        """Leaves nothing of a file that was not finished."""
        if self.images is not None:
            self.images.abandon()

    def _new(self, sizes: Mapping[str, int]) -> Images:
        return Images(self._state.folder, len(self._state.log), sizes, self._engine, self._checksum)

    def _take(self, base: Base) -> None:
        """A file is the base of its parameters; those that are nobody's any more, and not the last commit's, go."""
        self._stored |= dict.fromkeys(base.places, (base.file, base.step))
        self._bases[base.file] = base
        used = {file for file, _ in self._stored.values()}
        for file in self._bases.keys() - used:
            self._streams.store.forget(os.path.abspath(self._state.folder / file))
            del self._bases[file]
        self._state.sweep(used)

    def _checksum(self, data: torch.Tensor) -> str:
        return str(self._kernels.run("checksum", data))
