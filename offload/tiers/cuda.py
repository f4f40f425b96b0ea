"""A CUDA device: a copy stream each way beside the model's own, ordered by events, never by a full synchronisation."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from offload.errors import UsageError
from offload.io.buffers import Buffer
from offload.tiers.device import DeviceStatistics, Download, Event, Pairs
from offload.units import MIB


class CudaEvent:
    """A recorded torch.cuda.Event."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def wait(self) -> None:
        self.event.synchronize()


class CudaDownload:
    """A copy into pinned memory, and the event behind it."""

    def __init__(self, tensor: torch.Tensor, event: torch.cuda.Event) -> None:
        self._tensor, self._event = tensor, event

    def wait(self) -> torch.Tensor:
        self._event.synchronize()
        return self._tensor


class CudaDevice:
    """See `Device`. Memory comes from torch's allocator, so torch's own statistics count it."""

    has_memory = True
    keeps_alignment = False

    def __init__(self, name: str) -> None:
        if not torch.cuda.is_available():
            raise UsageError(
                f"device={name!r} was asked for, but torch {torch.__version__} sees no CUDA device; "
                "use device='cpu', or install a CUDA build of torch and a driver"
            )
        index = int(name.partition(":")[2] or torch.cuda.current_device())
        if index >= torch.cuda.device_count():
            raise UsageError(f"device={name!r} was asked for, but there are {torch.cuda.device_count()} CUDA devices")
        self.name = f"cuda:{index}"
        self.torch_device = torch.device(self.name)
        self._stream = torch.cuda.Stream(self.torch_device)
        self._down_stream = torch.cuda.Stream(self.torch_device)
        self._aside_stream = torch.cuda.Stream(self.torch_device)
        self._registered: list[int] = []
        self._uploaded = self._downloaded = 0
        self._lock = threading.Lock()

    def allocate(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.torch_device)

    def register(self, buffer: Buffer) -> str | None:
        if not buffer.nbytes:
            return None
        runtime: Any = torch.cuda.cudart()
        code = int(runtime.cudaHostRegister(buffer.address, buffer.nbytes, 0))
        if code:
            return f"host memory could not be pinned (CUDA error {code}): uploads go through the driver's own buffer"
        self._registered.append(buffer.address)
        return None

    def unregister(self, buffer: Buffer) -> None:
        if buffer.address in self._registered:
            runtime: Any = torch.cuda.cudart()
            runtime.cudaHostUnregister(buffer.address)
            self._registered.remove(buffer.address)

    def upload(self, pairs: Pairs, after: Event | None) -> Event:
        event = _copy(pairs, self._stream, after)  # after a slot's last compute, which must not see the new bytes
        with self._lock:
            self._uploaded += sum(source.numel() for _, source in pairs)
        return event

    def download_into(self, pairs: Pairs, after: Event | None) -> Event:
        event = _copy(pairs, self._down_stream, after)
        with self._lock:
            self._downloaded += sum(source.numel() for _, source in pairs)
        return event

    def download(self, tensor: torch.Tensor) -> Download:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)  # torch keeps such memory for the next
        host.copy_(tensor, non_blocking=True)  # on the model's stream: behind what computed it
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.torch_device))
        with self._lock:
            self._downloaded += tensor.numel() * tensor.element_size()
        return CudaDownload(host, event)

    def send(self, tensor: torch.Tensor, target: torch.Tensor) -> None:
        target.copy_(tensor, non_blocking=True)  # from pageable memory it waits until the driver has its own copy
        with self._lock:
            self._uploaded += tensor.numel() * tensor.element_size()

    def order_compute_after(self, event: Event) -> None:
        assert isinstance(event, CudaEvent)
        torch.cuda.current_stream(self.torch_device).wait_event(event.event)

    def mark_compute(self) -> Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.torch_device))
        return CudaEvent(event)

    def compute_aside(self, work: Callable[[], None], after: Event) -> Event:
        with torch.cuda.stream(self._aside_stream):
            if isinstance(after, CudaEvent):
                self._aside_stream.wait_event(after.event)
            work()
            event = torch.cuda.Event()
            event.record(self._aside_stream)
        return CudaEvent(event)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    def statistics(self) -> DeviceStatistics:
        used = torch.cuda.memory_allocated(self.torch_device)
        return DeviceStatistics(
            self._uploaded, self._downloaded, used, torch.cuda.max_memory_allocated(self.torch_device)
        )

    def close(self) -> None:
        self.synchronize()
        runtime: Any = torch.cuda.cudart()
        for address in self._registered:
            runtime.cudaHostUnregister(address)
        self._registered.clear()


def _copy(pairs: Pairs, stream: torch.cuda.Stream, after: Event | None) -> CudaEvent:
    """Enqueues copies of bytes on a stream, behind `after`."""
    with torch.cuda.stream(stream):
        if isinstance(after, CudaEvent):
            stream.wait_event(after.event)
        for target, source in pairs:
            target.copy_(source, non_blocking=True)
        event = torch.cuda.Event()
        event.record(stream)
    return CudaEvent(event)


def measure_link(device: torch.device, nbytes: int = 64 * MIB, rounds: int = 3) -> float:
    """Bytes per second of uploads from pinned memory; the best of some rounds."""
    host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(host, device=device)
    times = []
    with torch.cuda.device(device):  # events are recorded on the current one's stream
        for _ in range(rounds + 1):  # the first one touches everything
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            target.copy_(host, non_blocking=True)
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
    return nbytes / min(times[1:])
