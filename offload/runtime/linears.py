"""How nn.Linear computes: by a kernel for few rows, from packed weights where they are packed, and by torch without a
copy of the weight for each row.

Generation asks the head for the last token only, `head(hidden[:, -1:, :])`. That slice cannot be folded into a matrix,
so torch's CPU path runs a batched product and first copies a 16-bit weight once for every sequence: 6 GiB for a head of
200 MB and 32 sequences, and 20 seconds. Row by row gives the same bits (a batch of products with one row each) at the
speed of the weight's size. It was compared for 16-bit weights without a bias, and is used for those only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod

import torch
from torch import nn
from torch.nn import functional

from offload.kernels.chosen import Kernels, kind_of
from offload.kernels.formats.form import outputs_of, rows_of
from offload.runtime.packed import Packed
from offload.tiers.layout import Source
from offload.units import MIB

FEW = 64  # rows beyond which no kernel competes with a matrix product
BLOCK_NBYTES = 16 * MIB  # of a packed matrix that are unpacked at a time for many rows: they stay in the cache
_HALF = (torch.bfloat16, torch.float16)


def install(root: nn.Module, kernels: Kernels, *, has_packed: bool) -> Callable[[], None]:
    """Gives every nn.Linear below `root` that forward; returns what takes it away again.

    Args:
        kernels: what computes.
        has_packed: whether any weight is packed.
    """
    changed = [m for m in root.modules() if type(m) is nn.Linear and "forward" not in m.__dict__]
    if kernels.choice("linear").implementation == "torch" and not has_packed:
        changed = [m for m in changed if m.bias is None]  # torch's own is all that the others get
    for module in changed:
        module.forward = _forward(module, kernels)  # type: ignore[method-assign]

    def remove() -> None:
        for module in changed:
            module.__dict__.pop("forward", None)

    return remove


def unpack_nbytes(sources: Iterable[Source], exact: bool) -> int:
    """Memory that products of many rows take to unpack matrices: a block, or for exact results a whole one."""
    packed = [s for s in sources if s.form is not None]
    if not packed:
        return 0
    if exact:
        return max(prod(s.shape) * s.dtype.itemsize for s in packed)
    return 2 * BLOCK_NBYTES  # the block, and the one before it


def _forward(module: nn.Linear, kernels: Kernels) -> Callable[[torch.Tensor], torch.Tensor]:
    is_fast = kernels.choice("linear").implementation != "torch"

    def forward(x: torch.Tensor) -> torch.Tensor:
        weight, bias = module.weight, module.bias
        if type(weight) is Packed:
            return _from_packed(x, weight, bias, kernels)
        is_here = type(weight) is nn.Parameter  # and not what stands for a weight that was not brought
        if is_fast and is_here and _is_few(x) and not (torch.is_grad_enabled() and x.requires_grad):
            rows = x.contiguous()
            if kernels.refuses("linear", rows, weight, bias) is None:
                return kernels.run("linear", rows, weight, bias)  # type: ignore[no-any-return]
        return _by_torch(x, weight, bias)

    return forward


def _from_packed(x: torch.Tensor, weight: Packed, bias: torch.Tensor | None, kernels: Kernels) -> torch.Tensor:
    packed = weight.packed
    if kernels.exact:
        return _by_torch(x, weight.whole(), bias)
    if _is_few(x):
        rows, op = x.contiguous(), f"linear_{kind_of(packed)}"
        if kernels.refuses(op, rows, packed, bias) is None:
            return kernels.run(op, rows, packed, bias)  # type: ignore[no-any-return]
    outputs, inputs = outputs_of(packed), packed.inputs
    y = torch.empty(*x.shape[:-1], outputs, dtype=x.dtype, device=x.device)
    step = max(1, BLOCK_NBYTES // (inputs * x.element_size()))
    for first in range(0, outputs, step):
        last = min(outputs, first + step)
        block = kernels.unpack(rows_of(packed, first, last), x.dtype)
        y[..., first:last] = _by_torch(x, block, None if bias is None else bias[first:last])
    return y


def _is_few(x: torch.Tensor) -> bool:
    return x.numel() <= FEW * x.shape[-1]


def _by_torch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if bias is None and weight.dtype in _HALF and is_unfoldable_row(x):
        return torch.stack([functional.linear(row.clone(), weight) for row in x])
    return functional.linear(x, weight, bias)


def is_unfoldable_row(x: torch.Tensor) -> bool:
    """Whether `x` is [sequences, 1, width] on the CPU with gaps between its sequences."""
    return (
        x.dim() == 3 and x.shape[1] == 1 and x.device.type == "cpu" and x.stride(0) != x.shape[2] and x.stride(2) == 1
    )
