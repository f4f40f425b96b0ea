"""Where the model computes: the contract of a device, and the events that order its work.

A device with memory of its own takes uploads. Three events order things; each is a small object with the same methods
on every device, so that the executor is written once:

    upload done      the unit may compute; only then may the host slot be given back
    compute done     the device slot may be overwritten by a later upload
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from offload.io.buffers import Buffer

Pairs = Sequence[tuple[torch.Tensor, torch.Tensor]]


class Event(Protocol):
    """Something that will have happened."""

    def wait(self) -> None:
        """Blocks the calling thread until it has."""


class Download(Protocol):
    """A tensor on its way from the device to main memory."""

    def wait(self) -> torch.Tensor:
        """The tensor in main memory, when it is there."""


class Happened:
    """An event of a device whose work is done when its call returns."""

    def wait(self) -> None:
        return


@dataclass(frozen=True, slots=True)
class DeviceStatistics:
    """Bytes copied up and down so far, and bytes of device memory in use now and at most."""

    uploaded_bytes: int = 0
    downloaded_bytes: int = 0
    used_bytes: int = 0
    peak_bytes: int = 0


class Device(Protocol):
    """One place to compute.

    Attributes:
        name: `cpu`, `emulated` or `cuda:0`.
        torch_device: what tensors there report as their device.
        has_memory: whether weights must be uploaded.
        keeps_alignment: whether uploads keep a tensor's address modulo 64, because CPU kernels compute on it.
    """

    name: str
    torch_device: torch.device
    has_memory: bool
    keeps_alignment: bool

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Bytes (uint8) of device memory, counted against its cap."""

    def register(self, buffer: Buffer) -> str | None:
        """Makes host memory fast to upload from (pins it); says why when it could not."""

    def unregister(self, buffer: Buffer) -> None:
        """Ends what `register` began; the buffer's memory may go afterwards."""

    def upload(self, pairs: Pairs, after: Event | None) -> Event:
        """Copies (destination, source) pairs, not before `after`. Called from the upload lane only."""

    def download(self, tensor: torch.Tensor) -> Download:
        """Starts copying what the model computed to main memory. For small tensors, in the model's thread."""

    def download_into(self, pairs: Pairs, after: Event | None) -> Event:
        """Copies (destination in main memory, source) pairs, not before `after`. Called from the download lane only."""

    def send(self, tensor: torch.Tensor, target: torch.Tensor) -> None:
        """Copies from main memory to the device, ordered with the model's work. In the model's thread; `tensor` must
        not change afterwards."""

    def order_compute_after(self, event: Event) -> None:
        """Work that the model enqueues from now on starts after `event`, an upload."""

    def mark_compute(self) -> Event:
        """An event behind all work that the model has enqueued so far."""

    def compute_aside(self, work: Callable[[], None], after: Event) -> Event:
        """Has the device do work beside the model's own, not before `after`. Called from one lane only.

        Nothing else is ordered behind it: the caller waits for the event before anyone may use what the work has
        changed, or lets go of what it works in.
        """

    def synchronize(self) -> None:
        """Blocks until everything enqueued is done."""

    def statistics(self) -> DeviceStatistics: ...

    def close(self) -> None: ...
