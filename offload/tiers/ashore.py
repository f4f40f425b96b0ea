"""What an accelerator's memory has no room for between forward and backward: inputs of units wait in main memory, or go
on to disk from there."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from offload.tiers.device import Device, Download
from offload.tiers.stash import Stash, Ticket

PASSING = 2  # tensors on their way to disk that are in main memory: one that comes down and one that has


@dataclass(slots=True, eq=False)
class _Away:
    """A tensor that was put away: on its way to main memory, or on disk."""

    down: Download | None
    on_disk: Ticket | None = None


class Ashore:
    """For one thread at a time, the model's.

    Args:
        device: where tensors come from, and go back to.
        stash: where they wait; closed with this. None: in main memory.

    Attributes:
        peak_nbytes: most bytes that waited at once.
    """

    def __init__(self, device: Device, stash: Stash | None = None) -> None:
        self._device, self._stash, self._held = device, stash, 0
        self._away: dict[Ticket, _Away] = {}
        self._count = 0  # of tickets
        self._passing: deque[_Away] = deque()
        self.peak_nbytes = 0

    def put(self, tensor: torch.Tensor) -> Ticket:
        """Starts copying a tensor to main memory; the caller may let go of it.

        Raises:
            StorageError, BudgetError: see Stash.put.
        """
        self._held += tensor.numel() * tensor.element_size()
        self.peak_nbytes = max(self.peak_nbytes, self._held)
        ticket, self._count = Ticket(self._count), self._count + 1
        away = self._away[ticket] = _Away(self._device.download(tensor))
        if self._stash is not None:
            self._passing.append(away)
            while len(self._passing) > PASSING:  # the latest may not have been computed yet
                self._go_on(self._stash, self._passing.popleft())
        return ticket

    def expect(self, tickets: Sequence[Ticket]) -> None:
        """Tensors will be taken in this order. From disk they are read ahead; next to weights these bytes are few, so
        that they are not brought to the device ahead."""
        self._passing.clear()  # the last that were put are the first that are taken: they stay
        if self._stash is not None:
            places = [self._away[ticket].on_disk for ticket in tickets]
            self._stash.expect([place for place in places if place is not None])

    def take(self, ticket: Ticket) -> torch.Tensor:
        """The tensor, on the device again.

        Raises:
            StorageError: see Stash.take.
        """
        away = self._away.pop(ticket)
        if away.on_disk is not None:
            assert self._stash is not None
            host = self._stash.take(away.on_disk)
        else:
            assert away.down is not None
            host = away.down.wait()
        self._held -= host.numel() * host.element_size()
        target = torch.empty_like(host, device=self._device.torch_device)
        self._device.send(host, target)
        return target

    def clear(self) -> None:
        """Forgets everything, at the end of a pass."""
        self._held = 0
        self._away.clear()
        self._passing.clear()
        if self._stash is not None:
            self._stash.clear()

    def close(self) -> None:
        """Gives memory and disk back."""
        self.clear()
        if self._stash is not None:
            self._stash.close()

    @staticmethod
    def _go_on(stash: Stash, away: _Away) -> None:
        """From main memory to disk."""
        assert away.down is not None
        away.on_disk, away.down = stash.put(away.down.wait()), None
