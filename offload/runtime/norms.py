"""RMS norms by a kernel: whatever module computes x / rms(x) * weight, found by what it computes rather than by name.

A module with one vector for a parameter and a small number for its epsilon is asked, with numbers made up for it, what
it makes of them. If the kernel makes the same, within the rounding of one number, the kernel takes over. A norm that
multiplies by 1 + weight, subtracts a mean or adds a bias answers something else, and is left alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from offload.kernels.chosen import Kernels
from offload.runtime.linears import needs_gradient

_ROWS = 3
_SCALES = 1.0, 1e-3  # of made up numbers: beside the small ones an epsilon is not lost


def install(root: nn.Module, kernels: Kernels) -> Callable[[], None]:
    """Gives every RMS norm below `root` the kernel; returns what takes it away again."""
    known: dict[tuple[object, ...], bool] = {}
    changed = []
    for module in root.modules() if kernels.choice("rms_norm").implementation == "cpu" else ():
        eps = _epsilon(module)
        if eps is None or "forward" in module.__dict__:
            continue
        weight = module._parameters["weight"]
        assert weight is not None
        like = type(module), eps, weight.shape, weight.dtype
        if like not in known:
            known[like] = _is_rms_norm(module, eps, kernels)
        if known[like]:
            module.forward = _forward(module, eps, kernels)  # type: ignore[method-assign]
            changed.append(module)

    def remove() -> None:
        for module in changed:
            module.__dict__.pop("forward", None)

    return remove


def _epsilon(module: nn.Module) -> float | None:
    """Of a module that may be a norm: it has a vector `weight` and one small number, and nothing else."""
    if set(module._parameters) != {"weight"} or module._modules or module._buffers:
        return None
    weight = module._parameters["weight"]
    if weight is None or weight.dim() != 1:
        return None
    small = [v for n, v in vars(module).items() if n.endswith(("eps", "epsilon")) and isinstance(v, float)]
    return small[0] if len(small) == 1 and 0 < small[0] < 0.1 else None


def _is_rms_norm(module: nn.Module, eps: float, kernels: Kernels) -> bool:
    """Whether the kernel computes what the module does, on numbers made up for it."""
    given = module._parameters["weight"]
    assert given is not None
    numbers = torch.Generator().manual_seed(0)
    weight = (1 + torch.randn(given.shape, generator=numbers) / 2).to(given.dtype)
    made = torch.randn(_ROWS, *given.shape, generator=numbers)
    module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    try:
        for scale in _SCALES:
            x = (made * scale).to(given.dtype)
            with torch.no_grad():
                expected = module.forward(x)
            got = kernels.attempt("rms_norm", x, weight, eps)
            if got is None or not isinstance(expected, torch.Tensor) or expected.dtype != got.dtype:
                return False
            if not torch.allclose(got.float(), expected.float(), rtol=2 * torch.finfo(got.dtype).eps, atol=0):
                return False
    except Exception:  # it takes something else than one tensor, and may say so in any way
        return False
    finally:
        module._parameters["weight"] = given
    return True


def _forward(module: nn.Module, eps: float, kernels: Kernels) -> Callable[..., torch.Tensor]:
    own = type(module).forward

    def forward(x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        weight = module._parameters["weight"]
        if not args and not kwargs and type(weight) is nn.Parameter and not needs_gradient(x, weight):
            y = kernels.attempt("rms_norm", x if x.is_contiguous() else x.contiguous(), weight, eps)
            if y is not None:
                return y  # type: ignore[no-any-return]
        return own(module, x, *args, **kwargs)  # type: ignore[no-any-return]

    return forward
