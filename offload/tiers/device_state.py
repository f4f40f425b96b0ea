"""Optimizer state on an accelerator: slots in which a shard's state is for the time of its update."""

from __future__ import annotations

import torch

from offload.io.buffers import BufferPool
from offload.tiers.device import Device

SLOTS = 4  # one goes up, one is updated, one comes down, and one waits for whichever is late


class DeviceState:
    """Args:
        device: where they lie; their memory is taken at once.
        slot_nbytes: of the largest shard's state.

    Attributes:
        ring: lends the slots by index; their memory is the device's.
    """

    def __init__(self, device: Device, slot_nbytes: int) -> None:
        self.ring = BufferPool(SLOTS, 0)
        memory = device.allocate(SLOTS * slot_nbytes)
        self._slots = [memory[k * slot_nbytes :][:slot_nbytes] for k in range(SLOTS)]

    def area(self, slot: int, nbytes: int) -> torch.Tensor:
        """The first bytes of a slot."""
        return self._slots[slot][:nbytes]

    def close(self) -> None:
        """Lets go of the memory."""
        self._slots.clear()
        self.ring.close()
