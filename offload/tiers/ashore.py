"""What an accelerator's memory has no room for between forward and backward: inputs of units wait in main memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from offload.tiers.device import Device, Download


class Ashore:
    """Args: device: where tensors come from, and go back to. For one thread at a time, the model's.

    Attributes:
        peak_nbytes: most bytes that waited at once.
    """

    def __init__(self, device: Device) -> None:
        self._device, self._held = device, 0
        self.peak_nbytes = 0

    def put(self, tensor: torch.Tensor) -> Download:
        """Starts copying a tensor to main memory; the caller may let go of it."""
        self._held += tensor.numel() * tensor.element_size()
        self.peak_nbytes = max(self.peak_nbytes, self._held)
        return self._device.download(tensor)

    def expect(self, tickets: Sequence[Download]) -> None:
        """Nothing is brought ahead: next to weights these bytes are few."""

    def take(self, ticket: Download) -> torch.Tensor:
        """The tensor, on the device again."""
        host = ticket.wait()
        self._held -= host.numel() * host.element_size()
        target = torch.empty_like(host, device=self._device.torch_device)
        self._device.send(host, target)
        return target

    def clear(self) -> None:
        """Forgets everything, at the end of a pass."""
        self._held = 0

    def close(self) -> None:
        """See `clear`."""
        self.clear()
