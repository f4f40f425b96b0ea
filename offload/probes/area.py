"""Memory that weights, keys, values and optimizer states are taken from: larger than the caches, in huge pages."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch

from offload.io.buffers import Buffer
from offload.tiers.host import as_tensor

_PAGE = 4096
_MOST = 64  # copies of one tensor: enough of them leave no cache warm
_PATTERN = 1 << 20


class Area:
    """`nbytes` where the model computes, filled with numbers that are ordinary in every float format.

    A context manager that gives the memory back.
    """

    def __init__(self, nbytes: int, device: str = "cpu") -> None:
        self.nbytes = nbytes // _PATTERN * _PATTERN
        self._buffer = Buffer(self.nbytes) if device == "cpu" else None
        where: Any = torch.device(device)
        self.bytes = (
            as_tensor(self._buffer.view)
            if self._buffer is not None
            else torch.empty(self.nbytes, dtype=torch.uint8, device=where)
        )
        self.fill()

    def fill(self) -> None:
        """Small positive numbers everywhere; pairs of them read as float32 are small and positive, too."""
        numbers = (0.01 + 0.01 * torch.rand(_PATTERN // 2, generator=torch.Generator().manual_seed(0))).bfloat16()
        self.bytes.view(-1, _PATTERN).copy_(numbers.view(torch.uint8).to(self.bytes.device))

    def copies(self, shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
        """As many tensors side by side as there is room for; none where it is too large."""
        return self.carve(prod(shape) * dtype.itemsize, lambda run: run.view(dtype).view(shape))

    def carve(self, nbytes: int, make: Callable[[torch.Tensor], Any]) -> list[Any]:
        """What `make` makes of as many runs of `nbytes` as there is room for, at page boundaries."""
        step = -(-nbytes // _PAGE) * _PAGE
        count = min(_MOST, self.nbytes // step)
        return [make(self.bytes[at * step : at * step + nbytes]) for at in range(count)]

    def close(self) -> None:
        del self.bytes
        if self._buffer is not None:
            self._buffer.close()

    def __enter__(self) -> Area:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
