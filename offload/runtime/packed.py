"""What stands in a module for a parameter whose matrix lies packed in memory.

It has the parameter's shape, dtype and device. Products know it (see linears) and gathering rows unpacks just those
rows; any other operation gets the whole matrix, unpacked for that one operation: slow, but never wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from offload.kernels.chosen import Kernels
from offload.kernels.formats.form import Weight, take_rows

_EMBEDDING = torch.ops.aten.embedding.default
_ALIASES = {torch.ops.aten.detach.default, torch.ops.aten.alias.default}


class Packed(torch.Tensor):
    """A matrix in fewer bits, behind the face of a plain one.

    Attributes:
        packed: the planes.
        kernels: what unpacks them.
    """

    packed: Weight
    kernels: Kernels

    @staticmethod
    def __new__(
        cls, packed: Weight, kernels: Kernels, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Packed:
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device, requires_grad=False)
        self.packed, self.kernels = packed, kernels
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Packed({type(self.packed).__name__}, shape={tuple(self.shape)}, dtype={self.dtype})"

    def whole(self) -> torch.Tensor:
        """The matrix, unpacked, in memory of its own."""
        return self.kernels.unpack(self.packed, self.dtype)

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _ALIASES:
            self = args[0]
            return Packed(self.packed, self.kernels, tuple(self.shape), self.dtype, self.device)
        if func is _EMBEDDING and isinstance(args[0], Packed) and not isinstance(args[1], Packed):
            table, ids = args[0], args[1]
            unique, inverse = torch.unique(ids, return_inverse=True)
            rows = table.kernels.unpack(take_rows(table.packed, unique), table.dtype)
            return torch.nn.functional.embedding(inverse, rows)
        args, kwargs = tree_map_only(Packed, lambda t: t.whole(), (args, kwargs or {}))
        return func(*args, **kwargs)
