"""Puts tensors into a module's parameters and takes them out again, without touching the module's code."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from offload.runtime.absent import Absent, Fetcher
from offload.runtime.discovery import Owner


class Binder:
    """Binds tensors by name in every place that holds them.

    Args:
        owners: parameter name -> the places that hold it.
        like: parameter name -> a tensor of its shape and dtype (on meta, say).
        device: what an absent parameter reports as its device.
        fetcher: brings an absent tensor when something touches it outside its unit.
        faces: name -> what makes, of the run of bytes of a packed matrix, the tensor that a module sees.
    """

    def __init__(
        self,
        owners: Mapping[str, tuple[Owner, ...]],
        like: Mapping[str, torch.Tensor],
        device: torch.device,
        fetcher: Fetcher,
        faces: Mapping[str, Callable[[torch.Tensor], torch.Tensor]],
    ) -> None:
        self._owners, self._faces = owners, faces
        self._absent = {n: nn.Parameter(Absent(n, like[n], device, fetcher), requires_grad=False) for n in owners}
        self._parameters: dict[int, tuple[torch.Tensor, nn.Parameter]] = {}

    def bind(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Makes `tensors` the values of the parameters of those names. Views of a slot are always the same objects."""
        for name, tensor in tensors.items():
            known = self._parameters.get(id(tensor))
            if known is None or known[0] is not tensor:
                # .data: autograd counts changes of a tensor and all its views, and slots are views of one area.
                face = self._faces[name](tensor) if name in self._faces else tensor.data
                known = tensor, nn.Parameter(face, requires_grad=False)
                self._parameters[id(tensor)] = known
            self._set(name, known[1])

    def unbind(self, names: Mapping[str, torch.Tensor] | tuple[str, ...]) -> None:
        """Leaves nothing but the shape of the parameters of those names."""
        for name in names:
            self._set(name, self._absent[name])

    def clear(self) -> None:
        """Forgets every tensor that was bound."""
        self._parameters.clear()

    def _set(self, name: str, parameter: nn.Parameter) -> None:
        for owner in self._owners[name]:
            owner.module._parameters[owner.attribute] = parameter
