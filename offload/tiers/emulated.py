"""An accelerator twin for machines without one: its own capped memory behind a link of a stated rate.

The bytes are really copied and the model really computes (on the CPU), so results are those of the CPU; only time is
made up. Copies are paced by absolute deadlines, which do not drift: chunk n is over at start + n * chunk / rate.
"""

from __future__ import annotations

import threading
import time

import torch

from offload.errors import BudgetError
from offload.io.buffers import Buffer
from offload.tiers.device import DeviceStatistics, Event, Happened, Pairs
from offload.tiers.host import as_tensor
from offload.units import MIB, format_bytes

CHUNK = 4 * MIB


class EmulatedDevice:
    """See `Device`. `memory_nbytes` caps what may be allocated; `link_bytes_per_s` None leaves copies unpaced."""

    name = "emulated"
    has_memory = True
    keeps_alignment = True

    def __init__(self, memory_nbytes: int, link_bytes_per_s: float | None = None) -> None:
        self.torch_device = torch.device("cpu")
        self.memory_nbytes, self.link_bytes_per_s = memory_nbytes, link_bytes_per_s
        self._buffers: list[Buffer] = []
        self._used = self._uploaded = 0
        self._lock = threading.Lock()

    def allocate(self, nbytes: int) -> torch.Tensor:
        if self._used + nbytes > self.memory_nbytes:
            raise BudgetError(
                f"the emulated device has {format_bytes(self.memory_nbytes)}, {format_bytes(self._used)} of it in use; "
                f"{format_bytes(nbytes)} more does not fit"
            )
        buffer = Buffer(nbytes)
        self._buffers.append(buffer)
        self._used += nbytes
        return as_tensor(buffer.view)

    def register(self, buffer: Buffer) -> str | None:
        return None

    def unregister(self, buffer: Buffer) -> None:
        return

    def upload(self, pairs: Pairs, after: Event | None) -> Event:
        start = time.perf_counter()
        done = 0
        for target, source in pairs:
            for at in range(0, source.numel(), CHUNK):
                target[at : at + CHUNK].copy_(source[at : at + CHUNK])
                done += min(CHUNK, source.numel() - at)
                if self.link_bytes_per_s is not None:
                    early = start + done / self.link_bytes_per_s - time.perf_counter()
                    if early > 0:
                        time.sleep(early)
        with self._lock:
            self._uploaded += done
        return Happened()

    def order_compute_after(self, event: Event) -> None:
        event.wait()

    def mark_compute(self) -> Event:
        return Happened()

    def synchronize(self) -> None:
        return

    def statistics(self) -> DeviceStatistics:
        return DeviceStatistics(self._uploaded, self._used, self._used)

    def close(self) -> None:
        for buffer in self._buffers:
            buffer.close()
        self._buffers.clear()
        self._used = 0
