"""Main memory that is pinned for a device for as long as it is used, so that copies run at the link's rate."""

from __future__ import annotations

from offload.io.buffers import Buffer
from offload.tiers.device import Device


class Pins:
    """Args:
        device: whose; None: nothing is copied to a device.

    Attributes:
        fallbacks: why memory could not be pinned, a sentence each.
    """

    def __init__(self, device: Device | None = None) -> None:
        self._device = device
        self.fallbacks: list[str] = []

    def add(self, buffer: Buffer) -> None:
        """Pins a buffer, or says in `fallbacks` why it could not be."""
        if self._device is None:
            return
        reason = self._device.register(buffer)
        if reason is not None and reason not in self.fallbacks:
            self.fallbacks.append(reason)

    def remove(self, buffer: Buffer) -> None:
        """Ends it; the buffer's memory may go afterwards."""
        if self._device is not None:
            self._device.unregister(buffer)
