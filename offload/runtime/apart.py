"""A matrix whose rows two processors multiply by: the first ones on the accelerator, the others on the CPU.

Each computes with the rows that lie with it. Activations cross the link, weights do not:

    accelerator  x ------------------> x @ device rows ----------------------> | y |
    CPU             x comes down ----> x @ host rows -----> result goes up --> |   |

For few rows of x the CPU is done before the link could have brought its weights. Many rows (a prompt) are a matrix
product, which the accelerator does far better, so there the host rows go up, a block at a time, and are forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from math import prod
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from offload.kernels.chosen import Kernels
from offload.kernels.formats.form import outputs_of, rows_of
from offload.runtime.packed import Packed
from offload.tiers.device import Device, Download
from offload.tiers.layout import Source
from offload.units import MIB

FEW = 64  # rows of x up to which the CPU multiplies
BLOCK_NBYTES = 16 * MIB  # of host rows that go up at a time

_ALIASES = {torch.ops.aten.detach.default, torch.ops.aten.alias.default}


class Crossing:
    """The way of activations between the processors, and the CPU's kernels.

    Args:
        device: the accelerator.
        kernels: what computes with host rows; never exact, since another processor is another rounding.
    """

    def __init__(self, device: Device, kernels: Kernels) -> None:
        self.device, self.kernels = device, kernels
        self._last: tuple[torch.Tensor, int, Download] | None = None

    def download(self, x: torch.Tensor) -> Download:
        """Starts bringing `x` to main memory. Matrices with the same input (queries, keys, values) share the copy."""
        if x.is_inference():  # such tensors do not tell whether they were changed
            return self.device.download(x)
        if self._last is not None and self._last[0] is x and self._last[1] == x._version:
            return self._last[2]
        self._last = x, x._version, self.device.download(x)
        return self._last[2]

    def forget(self) -> None:
        """Lets the last input go."""
        self._last = None


class Apart(torch.Tensor):
    """A matrix in two places, behind the face of a plain one on the accelerator.

    Attributes:
        first: its first rows, on the accelerator; a tensor, a Packed one, or None.
        rest: the others, in main memory; a tensor or a Packed one.
        crossing: how to get from one to the other.
    """

    first: torch.Tensor | None
    rest: torch.Tensor
    crossing: Crossing

    @staticmethod
    def __new__(cls, first: torch.Tensor | None, rest: torch.Tensor, crossing: Crossing) -> Apart:
        rows = rest.shape[0] + (first.shape[0] if first is not None else 0)
        shape, device = (rows, *rest.shape[1:]), crossing.device.torch_device
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=rest.dtype, device=device, requires_grad=False)
        self.first, self.rest, self.crossing = first, rest, crossing
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Apart({self.shape[0] - self.rest.shape[0]} + {self.rest.shape[0]} rows, dtype={self.dtype})"

    def whole(self) -> torch.Tensor:
        """The matrix on the accelerator, in memory of its own."""
        parts = [_plain(self.rest).to(self.device)]
        return torch.cat([_plain(self.first), *parts]) if self.first is not None else parts[0]

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _ALIASES:
            return Apart(args[0].first, args[0].rest, args[0].crossing)
        args, kwargs = tree_map_only(Apart, lambda t: t.whole(), (args, kwargs or {}))
        return func(*args, **kwargs)


Multiply = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, Kernels], torch.Tensor]


def product(
    x: torch.Tensor, weight: Apart, bias: tuple[torch.Tensor, torch.Tensor] | None, kernels: Kernels, multiply: Multiply
) -> torch.Tensor:
    """x @ weight.T + bias.

    Args:
        x: [..., inputs], on the accelerator.
        bias: [outputs], on the accelerator and in main memory.
        kernels: the accelerator's.
        multiply: the product with one part: (x, matrix, bias, kernels) -> y.
    """
    crossing, split = weight.crossing, weight.shape[0] - weight.rest.shape[0]
    y = torch.empty(*x.shape[:-1], weight.shape[0], dtype=x.dtype, device=x.device)
    is_few = x.numel() <= FEW * x.shape[-1]
    coming = crossing.download(x) if is_few else None
    if weight.first is not None:
        y[..., :split] = multiply(x, weight.first, None if bias is None else bias[0][:split], kernels)
    if coming is not None:
        part = multiply(coming.wait(), weight.rest, None if bias is None else bias[1][split:], crossing.kernels)
        crossing.device.send(part, y[..., split:])
        return y
    inputs, rows = weight.shape[1], weight.rest.shape[0]
    step = max(1, BLOCK_NBYTES // (inputs * x.element_size()))
    for at in range(0, rows, step):
        end = min(rows, at + step)
        block = _sent(weight.rest, at, end, crossing.device, kernels)
        y[..., split + at : split + end] = multiply(
            x, block, None if bias is None else bias[0][split + at : split + end], kernels
        )
    return y


def passing_nbytes(sources: Iterable[Source]) -> int:
    """Device memory that host rows take on their way through: a block, and the one before it."""
    return 2 * min(BLOCK_NBYTES, max((prod(s.shape) * s.dtype.itemsize for s in sources), default=0))


def _plain(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.whole() if isinstance(matrix, Packed) else matrix


def _sent(rest: torch.Tensor, at: int, end: int, device: Device, kernels: Kernels) -> torch.Tensor:
    """Rows of what the CPU has, on the accelerator."""
    if not isinstance(rest, Packed):
        return _copy(rest[at:end], device)
    part = rows_of(rest.packed, at, end)
    planes = {f.name: getattr(part, f.name) for f in fields(part)}
    there = replace(part, **{n: _copy(p, device) for n, p in planes.items() if isinstance(p, torch.Tensor)})
    return Packed(there, kernels, (outputs_of(there), rest.shape[1]), rest.dtype, device.torch_device)


def _copy(tensor: torch.Tensor, device: Device) -> torch.Tensor:
    target = torch.empty(tensor.shape, dtype=tensor.dtype, device=device.torch_device)
    device.send(tensor, target)
    return target
