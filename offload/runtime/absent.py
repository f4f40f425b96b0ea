"""What stands in a module for a parameter that is not in memory just now.

It has the parameter's shape, dtype and device, and no storage. Gathering rows (an embedding) reads just those rows.
Anything else that touches it outside its unit's forward makes the owner fetch the whole tensor for that one operation:
slow, counted and reported, but never wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_map_only

_EMBEDDING = torch.ops.aten.embedding.default
_DETACH = torch.ops.aten.detach.default
_ALIASES = {_DETACH, torch.ops.aten.alias.default}


class Fetcher(Protocol):
    """Brings tensors that are not in memory; the runtime's session is one."""

    def rows(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        """Rows `ids` (1-D, sorted, unique) of a two-dimensional tensor, on the compute device."""

    def whole(self, name: str) -> torch.Tensor:
        """The tensor in memory of its own, on the compute device."""


class Absent(torch.Tensor):
    """A tensor without storage that knows where its values are."""

    _name: str
    _fetcher: Fetcher

    @staticmethod
    def __new__(cls, name: str, like: torch.Tensor, device: torch.device, fetcher: Fetcher) -> Absent:
        return cls._make(name, like.shape, like.dtype, device, fetcher)

    @classmethod
    def _make(cls, name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device, fetcher: Fetcher) -> Absent:
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device, requires_grad=False)
        self._name, self._fetcher = name, fetcher
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Absent({self._name!r}, shape={tuple(self.shape)}, dtype={self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Absent:
        return self

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _ALIASES:
            self = args[0]
            return cls._make(self._name, self.shape, self.dtype, self.device, self._fetcher)
        if func is _EMBEDDING and isinstance(args[0], Absent) and not isinstance(args[1], Absent):
            table, ids = args[0], args[1]
            unique, inverse = torch.unique(ids, return_inverse=True)
            return torch.nn.functional.embedding(inverse, table._fetcher.rows(table._name, unique))
        args, kwargs = tree_map_only(Absent, lambda t: t._fetcher.whole(t._name), (args, kwargs or {}))
        return func(*args, **kwargs)
