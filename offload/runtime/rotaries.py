"""Rotary embedding by a kernel: it stands in for a modelling file's own function while sessions are open.

transformers' models call a function of their file, not a module's, so the file's name is bound to another function. It
gives the same bits, which is tried out first, so nobody who shares the file can tell.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from offload.kernels.chosen import Kernels
from offload.runtime.linears import needs_gradient

NAME = "apply_rotary_pos_emb"
_replaced: dict[str, tuple[int, Any]] = {}  # file -> how many sessions want the kernel, and the file's own function


def install(root: nn.Module, kernels: Kernels) -> Callable[[], None]:
    """Binds the kernel in the files of `root`'s modules where it gives the same bits; returns what undoes it."""
    files: set[str] = set()
    if kernels.choice("rotary").implementation == "cpu":
        for file in {type(module).__module__ for module in root.modules()}:
            if file in _replaced or _gives_the_same(getattr(sys.modules[file], NAME, None), kernels):
                files.add(file)
    for file in files:
        count, own = _replaced.get(file, (0, getattr(sys.modules[file], NAME)))
        _replaced[file] = count + 1, own
        if count == 0:
            setattr(sys.modules[file], NAME, _by_kernel(own, kernels))

    def remove() -> None:
        for file in files:
            count, own = _replaced.pop(file)
            if count > 1:
                _replaced[file] = count - 1, own
            else:
                setattr(sys.modules[file], NAME, own)
        files.clear()

    return remove


def _gives_the_same(own: Any, kernels: Kernels) -> bool:
    """Whether the kernel is that function, on numbers made up for it."""
    if not callable(own) or list(inspect.signature(own).parameters)[:4] != ["q", "k", "cos", "sin"]:
        return False
    numbers = torch.Generator().manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        q, k = (torch.randn(2, 3, n, 64, generator=numbers).to(dtype).transpose(1, 2) for n in (4, 2))
        cos, sin = (torch.randn(2, 3, 64, generator=numbers).to(dtype) for _ in range(2))
        got = kernels.attempt("rotary", q, k, cos, sin)
        try:
            expected = own(q, k, cos, sin)
        except (RuntimeError, TypeError, ValueError):  # it takes angles of another form
            return False
        if got is None or not all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)):
            return False
    return True


def _by_kernel(own: Any, kernels: Kernels) -> Any:
    @functools.wraps(own)
    def apply(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        is_plain = not args and not kwargs and q.dim() == k.dim() == 4 and cos.dim() == sin.dim() == 3
        if is_plain and not needs_gradient(q, k):
            turned = kernels.attempt("rotary", q, k, cos, sin)
            if turned is not None:
                return turned
        return own(q, k, cos, sin, *args, **kwargs)

    return apply
