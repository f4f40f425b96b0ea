"""An accelerator twin for machines without one: its own capped memory behind a link of a stated rate.

The bytes are really copied and the model really computes (on the CPU), so results are those of the CPU; only time is
made up. Copies are paced by absolute deadlines, which do not drift: a chunk is over chunk / rate after the one before
it, whoever asked for that one. A small copy that somebody waits for goes between the packets of a large one, as on
PCIe, and the large one ends later by as much. Each direction has a link of its own.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable

import torch

from offload.errors import BudgetError
from offload.io.buffers import Buffer
from offload.tiers.device import DeviceStatistics, Download, Event, Happened, Pairs
from offload.tiers.host import as_tensor
from offload.units import KIB, MIB, format_bytes

CHUNK = 4 * MIB
SMALL = 64 * KIB  # CUDA sends so much along with the command: it never queues behind a copy


def move(target: int, source: int, nbytes: int) -> None:
    """Copies between addresses in this thread alone, without Python's lock.

    torch would start a team of threads for the lane, which spins for a while after each copy: on cores that compute.
    """
    ctypes.memmove(target, source, nbytes)


class _Lane:
    """One direction of the link: hands out times at which copies are over."""

    def __init__(self, bytes_per_s: float | None) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_at = 0.0  # when what was asked for so far is over
        self._lock = threading.Lock()
        self.nbytes = 0

    def carry(self, nbytes: int, began: float) -> None:
        """Waits until so many bytes would have crossed, which were asked for at that time."""
        with self._lock:
            self.nbytes += nbytes
            if self._bytes_per_s is None:
                return
            takes = nbytes / self._bytes_per_s
            self._free_at = max(self._free_at, began) + takes
            over = began + takes if nbytes <= SMALL else self._free_at
            early = over - time.perf_counter()
        if early > 0:
            time.sleep(early)


class _Downloaded:
    """A copy that is there already."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def wait(self) -> torch.Tensor:
        return self._tensor


class EmulatedDevice:
    """See `Device`. `memory_nbytes` caps what may be allocated; `link_bytes_per_s` None leaves copies unpaced."""

    name = "emulated"
    has_memory = True
    keeps_alignment = True

    def __init__(self, memory_nbytes: int, link_bytes_per_s: float | None = None) -> None:
        self.torch_device = torch.device("cpu")
        self.memory_nbytes, self.link_bytes_per_s = memory_nbytes, link_bytes_per_s
        self._buffers: list[Buffer] = []
        self._used = 0
        self._up, self._down = _Lane(link_bytes_per_s), _Lane(link_bytes_per_s)

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
        return _copy(pairs, self._up)

    def download_into(self, pairs: Pairs, after: Event | None) -> Event:
        return _copy(pairs, self._down)

    def download(self, tensor: torch.Tensor) -> Download:
        began = time.perf_counter()
        host = tensor.clone()
        self._down.carry(tensor.numel() * tensor.element_size(), began)
        return _Downloaded(host)

    def send(self, tensor: torch.Tensor, target: torch.Tensor) -> None:
        began = time.perf_counter()
        target.copy_(tensor)
        self._up.carry(tensor.numel() * tensor.element_size(), began)

    def order_compute_after(self, event: Event) -> None:
        event.wait()

    def mark_compute(self) -> Event:
        return Happened()

    def compute_aside(self, work: Callable[[], None], after: Event) -> Event:
        after.wait()
        work()
        return Happened()

    def synchronize(self) -> None:
        return

    def statistics(self) -> DeviceStatistics:
        return DeviceStatistics(self._up.nbytes, self._down.nbytes, self._used, self._used)

    def close(self) -> None:
        for buffer in self._buffers:
            buffer.close()
        self._buffers.clear()
        self._used = 0


def _copy(pairs: Pairs, lane: _Lane) -> Event:
    """Copies bytes at a lane's pace; they are there when it returns."""
    began = time.perf_counter()
    for target, source in pairs:
        for at in range(0, source.numel(), CHUNK):
            nbytes = min(CHUNK, source.numel() - at)
            move(target.data_ptr() + at, source.data_ptr() + at, nbytes)
            lane.carry(nbytes, began)
    return Happened()
