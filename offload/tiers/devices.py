"""The devices there are, by name; the plain CPU, which has no memory of its own, is at home here."""

from __future__ import annotations

from collections.abc import Callable

import torch

from offload.errors import UsageError
from offload.io.buffers import Buffer
from offload.tiers.device import Device, DeviceStatistics, Download, Event, Happened, Pairs
from offload.tiers.names import check_name


class CpuDevice:
    """No accelerator: the model computes on host memory and nothing is uploaded."""

    name = "cpu"
    has_memory = False
    keeps_alignment = True

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")

    def allocate(self, nbytes: int) -> torch.Tensor:
        raise AssertionError("the plain CPU has no memory of its own")

    def register(self, buffer: Buffer) -> str | None:
        return None

    def unregister(self, buffer: Buffer) -> None:
        return

    def upload(self, pairs: Pairs, after: Event | None) -> Event:
        raise AssertionError("nothing is uploaded to the plain CPU")

    def download(self, tensor: torch.Tensor) -> Download:
        raise AssertionError("nothing is downloaded from the plain CPU")

    def download_into(self, pairs: Pairs, after: Event | None) -> Event:
        raise AssertionError("nothing is downloaded from the plain CPU")

    def send(self, tensor: torch.Tensor, target: torch.Tensor) -> None:
        raise AssertionError("nothing is sent to the plain CPU")

    def order_compute_after(self, event: Event) -> None:
        return

    def mark_compute(self) -> Event:
        return Happened()

    def compute_aside(self, work: Callable[[], None], after: Event) -> Event:
        raise AssertionError("the plain CPU has nobody beside it")

    def synchronize(self) -> None:
        return

    def statistics(self) -> DeviceStatistics:
        return DeviceStatistics()

    def close(self) -> None:
        return


def warm_up(name: str) -> None:
    """Lets a device's libraries take the main memory they need, so that it can be counted beforehand."""
    if name.startswith("cuda") and torch.cuda.is_available():
        torch.zeros(1, device=name)
        torch.cuda.synchronize(name)


def full_name(device: str | None) -> str:
    """The device's full name: CUDA if there is one and nothing was asked, and with its number.

    Raises:
        UsageError: no device has that name.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    check_name(device)
    return f"cuda:{torch.cuda.current_device()}" if device == "cuda" and torch.cuda.is_available() else device


def link_rate(name: str) -> float | None:
    """Bytes per second that cross a device's link, measured; None for a link that has no limit of its own."""
    if not name.startswith("cuda"):
        return None
    from offload.tiers.cuda import measure_link

    return measure_link(torch.device(name))


def create(name: str, *, memory_nbytes: int | None = None, link_bytes_per_s: float | None = None) -> Device:
    """The device of that name.

    Args:
        name: `cpu`, `emulated`, `cuda` or `cuda:N`.
        memory_nbytes: cap on the device's memory; needed for `emulated`.
        link_bytes_per_s: pace of the emulated link in each direction; None: as fast as memory copies go.

    Raises:
        UsageError: no such device, or it is not usable here.
    """
    if name == "cpu":
        return CpuDevice()
    if name == "emulated":
        from offload.tiers.emulated import EmulatedDevice

        if memory_nbytes is None:
            raise UsageError('device="emulated" needs gpu_memory: how much memory should it have?')
        return EmulatedDevice(memory_nbytes, link_bytes_per_s)
    check_name(name)
    from offload.tiers.cuda import CudaDevice

    return CudaDevice(name)
