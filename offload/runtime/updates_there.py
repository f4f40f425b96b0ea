"""Updates that the accelerator makes: a shard's state goes up, is updated beside the model's work, and comes back.

    upload lane     state: main memory, or a slot that it was read into -> a slot there
    aside lane      gradient and state -> weights and state, where the model has left the gradient
    download lane   state -> where it came from; what was read is written

A shard is in one of these lanes at a time, so while one comes down, another goes up and a third is updated.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from offload.io.buffers import Lease
from offload.planner.training_steps import DownloadShard, UpdateThere, UploadShard
from offload.runtime.timeline import Timeline, now
from offload.runtime.training_lanes import TrainingLanes
from offload.runtime.training_walk import Rule
from offload.tiers.cells import Cells, Shard
from offload.tiers.device import Device, Event, Happened
from offload.tiers.device_cells import DeviceCells
from offload.tiers.device_state import DeviceState
from offload.tiers.host import as_tensor

ALIGNED = 16  # bytes: what compilers of kernels make a difference of


@dataclass(frozen=True, slots=True)
class ShareThere:
    """What an accelerator updates itself.

    Attributes:
        shards: their names.
        rule: the optimizer, with that device's kernels.
        slots: for state on it.
    """

    shards: frozenset[str]
    rule: Rule
    slots: DeviceState


class UpdatesThere:
    """Args:
    device: what updates.
    share: what of it.
    lanes: bring shards that are on disk, and write them.
    """

    def __init__(
        self, device: Device, share: ShareThere, lanes: TrainingLanes, cells: Cells, timeline: Timeline
    ) -> None:
        self._device, self.slots, self._rule = device, share.slots, share.rule
        self._lanes, self._timeline, self._going_up = lanes, timeline, share.shards
        self._shards: dict[str, Shard] = {s.name: s for cell in cells.layouts.values() for s in cell.shards}
        self._above: dict[str, Lease] = {}  # shard -> its slot there
        self._below: dict[str, tuple[torch.Tensor, Lease | None]] = {}  # where its state came from

    def warm(self, there: DeviceCells, numbers: Any) -> None:
        """Compiles the kernel for each kind of shard that goes up: with zeros, where nothing has been brought yet.

        Args:
            there: cells on the device.
            numbers: the optimizer's, of a step that changes nothing.
        """
        seen = set()
        for name in sorted(self._going_up):
            shard = self._shards[name]
            kind = (shard.dtype, shard.count, shard.at % ALIGNED, shard.decays)
            if kind in seen:
                continue
            seen.add(kind)
            with self.slots.ring.lease() as lease:
                state = self.slots.area(lease.index, self._rule.state_nbytes(shard.shape)).zero_()
                cell = shard.of(there.area(shard.unit, None if there.stays(shard.unit) else 0)).zero_()
                work = partial(self._rule.step, state, cell, numbers, decays=shard.decays)
                self._device.compute_aside(work, Happened()).wait()

    def upload(self, step: UploadShard) -> None:
        """State goes up. Waits for a slot, and for the disk."""
        name = step.shard
        lease = self.slots.ring.lease()
        try:
            view, from_disk = self._lanes.reads.take_shard(name, "upload")
        except BaseException:
            lease.release()
            raise
        self._above[name], self._below[name] = lease, (as_tensor(view), from_disk)
        start = now()
        self._device.upload([(self._area(name), self._below[name][0])], None).wait()
        self._timeline.add("upload", name, start, now(), len(view))

    def update(self, step: UpdateThere, cell: torch.Tensor, after: Event, numbers: Any) -> None:
        """Gradient and state become weights and state.

        Args:
            cell: bytes of the unit's cell, there.
            after: the gradient is complete.
        """
        shard = self._shards[step.shard]
        state = self._area(step.shard)[: self._rule.state_nbytes(shard.shape)]
        start = now()

        def work() -> None:
            self._rule.step(state, shard.of(cell), numbers, decays=shard.decays)

        self._device.compute_aside(work, after).wait()  # so that whoever follows need not know of its stream
        self._timeline.add("aside", step.shard, start, now(), step.nbytes)

    def download(self, step: DownloadShard) -> Lease | None:
        """State comes back; returns the slot of main memory to write from, if it came from disk."""
        name = step.shard
        target, from_disk = self._below[name]
        start = now()
        self._device.download_into([(target, self._area(name))], None).wait()
        self._timeline.add("download", name, start, now(), len(target))
        del self._below[name]
        self._above.pop(name).release()
        return from_disk

    def drop(self) -> None:
        """The lanes have stopped: gives back what they hold."""
        for lease in [*self._above.values(), *(lease for _, lease in self._below.values() if lease is not None)]:
            lease.release()
        self._above.clear()
        self._below.clear()

    def close(self) -> None:
        """Lets go of the memory there."""
        self.slots.close()

    def _area(self, name: str) -> torch.Tensor:
        return self.slots.area(self._above[name].index, self._lanes.nbytes[name])
