"""Two areas of memory in which a unit's weights lie moved to one side and to the other, while it is visited."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from offload.io.buffers import Buffer
from offload.tiers.device import Device, Event
from offload.tiers.host import as_tensor
from offload.tiers.layout import Source, View
from offload.tiers.slots import VIEW_ALIGNMENT, round_up

Tensors = dict[str, torch.Tensor]


class TwoSides:
    """Areas as large as the largest unit, in huge pages; where an accelerator computes, two more on it.

    Args:
        units: unit name -> the tensors that it uses.
        sources: their dtypes and shapes.
        device: where the model computes; its owner closes it.

    Attributes:
        fallback: why copies to the device do not go the fast way; None when they do.
    """

    def __init__(self, units: Mapping[str, Sequence[str]], sources: Mapping[str, Source], device: Device) -> None:
        layouts = {unit: _lay_out(names, sources) for unit, names in units.items()}
        size = sides_nbytes(units, sources) // 2
        self._device = device
        self._buffer = Buffer(2 * size)
        whole = as_tensor(self._buffer.view)
        self._here = whole[:size], whole[size:]
        self._there: tuple[torch.Tensor, torch.Tensor] | None = None
        self.fallback: str | None = None
        if device.has_memory:
            memory = device.allocate(2 * size)
            self._there = memory[:size], memory[size:]
            self.fallback = device.register(self._buffer)
        self._nbytes = {unit: nbytes for unit, (_, nbytes) in layouts.items()}
        self._made = {unit: _views(places, self._here) for unit, (places, _) in layouts.items()}
        self._used = {unit: _views(places, self._there or self._here) for unit, (places, _) in layouts.items()}
        self._sent: Event | None = None

    @property
    def nbytes(self) -> int:
        """Of both areas in main memory."""
        return self._buffer.nbytes

    @property
    def are_sent(self) -> bool:
        """Whether the model computes elsewhere than where the sides are made."""
        return self._there is not None

    def of(self, unit: str) -> tuple[Tensors, Tensors]:
        """Where the tensors of a unit are made, on the one side and on the other. What was made before is on its way
        no more."""
        if self._sent is not None:
            self._sent.wait()
            self._sent = None
        return self._made[unit]

    def send(self, unit: str, *, both: bool) -> int:
        """Copies what was made to the device, ordered with the model's work; only the first side, or both.

        Returns bytes.
        """
        assert self._there is not None
        for here, there in list(zip(self._here, self._there, strict=True))[: 1 + both]:
            self._device.send(here[: self._nbytes[unit]], there[: self._nbytes[unit]])
        self._sent = self._device.mark_compute()
        return (1 + both) * self._nbytes[unit]

    def used(self, unit: str) -> tuple[Tensors, Tensors]:
        """The tensors of a unit where the model computes; the same objects every time."""
        return self._used[unit]

    def close(self) -> None:
        """Gives the memory back with the last view of it."""
        if self._there is not None:
            self._device.synchronize()
            self._device.unregister(self._buffer)
        self._made.clear()
        self._used.clear()
        self._there = None
        self._here = torch.empty(0), torch.empty(0)
        self._buffer = Buffer(0)


def sides_nbytes(units: Mapping[str, Sequence[str]], sources: Mapping[str, Source]) -> int:
    """Bytes of both areas."""
    return 2 * max((_lay_out(names, sources)[1] for names in units.values()), default=0)


def _views(places: Mapping[str, View], areas: tuple[torch.Tensor, torch.Tensor]) -> tuple[Tensors, Tensors]:
    plus, minus = ({name: view.of(area) for name, view in places.items()} for area in areas)
    return plus, minus


def _lay_out(names: Sequence[str], sources: Mapping[str, Source]) -> tuple[dict[str, View], int]:
    """Places for tensors, aligned as fresh ones are, and the bytes they take."""
    places, end = {}, 0
    for name in names:
        source = sources[name]
        places[name] = View(end, source.dtype, source.shape)
        end += round_up(source.nbytes, VIEW_ALIGNMENT)
    return places, round_up(end, 4096)
