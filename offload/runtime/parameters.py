"""The model's parameters in training: views of cells while those are in memory, and otherwise NaN without memory.

A parameter keeps its identity, and what it shows changes. NaN, because whoever uses a weight outside the visit of its
unit shall not find something that looks like one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn

from offload.runtime.buffers import move_buffers
from offload.runtime.discovery import Anatomy


class Parameters:
    """Takes the place of a model's parameters until it is closed.

    Args:
        anatomy: which modules hold them.
        shapes: dtype and shape of each that is trained.
        frozen: the values of all others.
        device: what those that are absent say they are on.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        frozen: Mapping[str, torch.Tensor],
        device: torch.device | None = None,
    ) -> None:
        self.trained: dict[str, nn.Parameter] = {}
        self._absent: dict[str, torch.Tensor] = {}
        self._device = device
        self._put_back: Callable[[], None] = lambda: None
        self._bound: list[tuple[nn.Module, str, nn.Parameter | None]] = []
        for name, owners in anatomy.owners.items():
            if name in frozen:
                parameter = nn.Parameter(frozen[name], requires_grad=False)
            else:
                dtype, shape = shapes[name]
                self._absent[name] = torch.full((), torch.nan, dtype=dtype, device=device).expand(shape)
                parameter = self.trained[name] = nn.Parameter(self._absent[name])
            for owner in owners:
                self._bound.append((owner.module, owner.attribute, owner.module._parameters[owner.attribute]))
                owner.module._parameters[owner.attribute] = parameter

    def show(self, views: Mapping[str, torch.Tensor]) -> None:
        """Parameters are these tensors from now on."""
        for name, view in views.items():
            # .data: autograd counts changes of a tensor and all its views, and cells are views of one area.
            self.trained[name].data = view.data

    def hide(self, names: Iterator[str] | Mapping[str, object]) -> None:
        """Parameters are absent from now on."""
        for name in names:
            self.trained[name].data = self._absent[name]

    def move_buffers(self, root: nn.Module) -> None:
        """Buffers go along to the device."""
        if self._device is not None:
            self._put_back = move_buffers(root, self._device)

    def close(self) -> None:
        """Gives the model its own parameters and buffers back."""
        self._put_back()
        for module, attribute, parameter in self._bound:
            module._parameters[attribute] = parameter
        self._bound.clear()
