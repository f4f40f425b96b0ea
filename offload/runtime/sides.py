"""Two areas of memory in which a unit's weights lie moved to one side and to the other, while it is visited."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from offload.io.buffers import Buffer
from offload.tiers.host import as_tensor
from offload.tiers.layout import Source, View
from offload.tiers.slots import VIEW_ALIGNMENT, round_up


class TwoSides:
    """Areas as large as the largest unit, in huge pages.

    Args:
        units: unit name -> the tensors that it uses.
        sources: their dtypes and shapes.
    """

    def __init__(self, units: Mapping[str, Sequence[str]], sources: Mapping[str, Source]) -> None:
        layouts = {unit: _lay_out(names, sources) for unit, names in units.items()}
        size = sides_nbytes(units, sources) // 2
        self._buffer = Buffer(2 * size)
        whole = as_tensor(self._buffer.view)
        areas = whole[:size], whole[size:]
        self._views = {
            unit: tuple({name: view.of(area) for name, view in places.items()} for area in areas)
            for unit, (places, _) in layouts.items()
        }

    @property
    def nbytes(self) -> int:
        """Of both areas."""
        return self._buffer.nbytes

    def of(self, unit: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The tensors of a unit on the one side and on the other; the same objects every time."""
        plus, minus = self._views[unit]
        return plus, minus

    def close(self) -> None:
        """Gives the memory back with the last view of it."""
        self._views.clear()
        self._buffer = Buffer(0)


def sides_nbytes(units: Mapping[str, Sequence[str]], sources: Mapping[str, Source]) -> int:
    """Bytes of both areas."""
    return 2 * max((_lay_out(names, sources)[1] for names in units.values()), default=0)


def _lay_out(names: Sequence[str], sources: Mapping[str, Source]) -> tuple[dict[str, View], int]:
    """Places for tensors, aligned as fresh ones are, and the bytes they take."""
    places, end = {}, 0
    for name in names:
        source = sources[name]
        places[name] = View(end, source.dtype, source.shape)
        end += round_up(source.nbytes, VIEW_ALIGNMENT)
    return places, round_up(end, 4096)
