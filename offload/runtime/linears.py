"""How nn.Linear computes: by a kernel for few rows, from packed weights where they are packed, on two processors where
a weight lies apart, and by torch without a copy of the weight for each row.

Generation asks the head for the last token only, `head(hidden[:, -1:, :])`. That slice cannot be folded into a matrix,
so torch's CPU path runs a batched product and first copies a 16-bit weight once for every sequence: 6 GiB for a head of
200 MB and 32 sequences, and 20 seconds. Row by row gives the same bits (a batch of products with one row each) at the
speed of the weight's size. It was compared for 16-bit weights without a bias, and is used for those only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from offload.kernels.chosen import Kernels, kind_of
from offload.kernels.formats.form import outputs_of, rows_of
from offload.runtime.apart import FEW, Apart, product
from offload.runtime.packed import Packed
from offload.runtime.siblings import Siblings
from offload.tiers.layout import Source
from offload.units import MIB

BLOCK_NBYTES = 16 * MIB  # of a packed matrix that are unpacked at a time for many rows: they stay in the cache
WIDE = 64  # outputs that the kernel for many rows takes at a time
MANY = 8  # rows of x from which a product is one of matrices (kernels/cpu/linear_many.py)
_HALF = (torch.bfloat16, torch.float16)


def install(root: nn.Module, kernels: Kernels, *, has_faces: bool) -> Callable[[], None]:
    """Gives every nn.Linear below `root` that forward; returns what takes it away again.

    Args:
        kernels: what computes.
        has_faces: whether any weight is packed or lies apart.
    """
    changed = [m for m in root.modules() if type(m) is nn.Linear and "forward" not in m.__dict__]
    if kernels.choice("linear").implementation == "torch" and not has_faces:
        changed = [m for m in changed if m.bias is None]  # torch's own is all that the others get
    is_changed = set(map(id, changed))
    for parent in root.modules():
        _replace([m for m in parent.children() if isinstance(m, nn.Linear) and id(m) in is_changed], kernels)

    def remove() -> None:
        for module in changed:
            module.__dict__.pop("forward", None)

    return remove


def is_same_unpacked(kernels: Kernels, shape: tuple[int, ...]) -> bool:
    """Whether many rows times a bf16 matrix, [outputs, inputs], give the same bits where it is unpacked in blocks: our
    kernel does, torch's may choose another way for another number of outputs."""
    outputs, inputs = min(WIDE, shape[0]), shape[1]
    x, weight = (torch.empty(rows, inputs, dtype=torch.bfloat16) for rows in (MANY, outputs))
    return (
        kernels.choice("linear_many").implementation != "torch"
        and shape[0] % 16 == 0
        and kernels.refuses("linear_many", x, weight) is None
    )


def unpack_nbytes(sources: Iterable[Source], exact: bool) -> int:
    """Memory that products of many rows take to unpack matrices: a block, or for exact results a whole one."""
    packed = [s for s in sources if s.form is not None]
    if not packed:
        return 0
    largest = max(prod(s.shape) * s.dtype.itemsize for s in packed)
    return largest if exact else 2 * min(BLOCK_NBYTES, largest)  # a block, and the one before it


def _replace(together: Sequence[nn.Linear], kernels: Kernels) -> None:
    """Gives the linears of one module their forward."""

    def compute(x: torch.Tensor, numbers: Sequence[int]) -> list[torch.Tensor] | None:
        operands = [_operand(together[number]) for number in numbers]
        if any(weight is None for weight, _ in operands):
            return None
        return kernels.attempt("linears", x, operands)  # type: ignore[no-any-return]

    are_joined = len(together) > 1 and kernels.choice("linears").implementation != "torch"
    siblings = Siblings(compute) if are_joined else None
    for number, module in enumerate(together):
        module.forward = _forward(module, kernels, siblings, number)  # type: ignore[method-assign]


def _operand(module: nn.Linear) -> tuple[Any, torch.Tensor | None]:
    """Weight and bias for `linears`; None in place of a weight that is not here as a whole."""
    weight, bias = module._parameters["weight"], module._parameters["bias"]
    if isinstance(weight, Packed):
        return weight.packed, bias
    return weight if type(weight) is nn.Parameter else None, bias


def _forward(
    module: nn.Linear, kernels: Kernels, siblings: Siblings | None, number: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    biases = _BothSides()

    def forward(x: torch.Tensor) -> torch.Tensor:
        weight, bias = module.weight, module.bias
        if type(weight) is Apart:
            return product(x, weight, None if bias is None else biases.of(bias), kernels, multiply)
        if type(weight) is not Packed and type(weight) is not nn.Parameter:
            return _by_torch(x, weight, bias)  # what stands for a weight that was not brought
        if siblings is not None and x.is_contiguous() and _is_few(x) and not needs_gradient(x, weight):
            y = siblings.take(number, x)
            if y is not None:
                return y
        return multiply(x, weight, bias, kernels)

    return forward


class _BothSides:
    """A bias in main memory beside the one on the device; it is small, and stays where it is."""

    def __init__(self) -> None:
        self._known: tuple[torch.Tensor, torch.Tensor] | None = None

    def of(self, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self._known is None or self._known[0] is not bias:
            self._known = bias, bias.detach().to("cpu")
        return self._known


def multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, kernels: Kernels) -> torch.Tensor:
    """x @ weight.T + bias, for a plain or a packed matrix where `kernels` compute."""
    if isinstance(weight, Packed):
        return _from_packed(x, weight, bias, kernels)
    if not needs_gradient(x, weight):
        y = kernels.attempt("linear_many" if _is_many(x) else "linear", x.contiguous(), weight, bias)
        if y is not None:
            return y  # type: ignore[no-any-return]
    return _by_torch(x, weight, bias)


def _from_packed(x: torch.Tensor, weight: Packed, bias: torch.Tensor | None, kernels: Kernels) -> torch.Tensor:
    packed = weight.packed
    if kernels.exact:
        return _by_torch(x, weight.whole(), bias)
    is_few = _is_few(x) and not (kernels.unpacks and _is_many(x))
    if is_few and not needs_gradient(x):
        y = kernels.attempt(f"linear_{kind_of(packed)}", x.contiguous(), packed, bias)
        if y is not None:
            return y  # type: ignore[no-any-return]
    outputs, inputs = outputs_of(packed), packed.inputs
    y = torch.empty(*x.shape[:-1], outputs, dtype=x.dtype, device=x.device)
    step = max(WIDE, BLOCK_NBYTES // (inputs * x.element_size()) // WIDE * WIDE)
    for first in range(0, outputs, step):
        last = min(outputs, first + step)
        block = kernels.unpack(rows_of(packed, first, last), x.dtype)
        y[..., first:last] = multiply(x, block, None if bias is None else bias[first:last], kernels)
    return y


def needs_gradient(*operands: torch.Tensor) -> bool:
    """Whether a backward pass may come through any of these: kernels have none."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in operands)


def _is_few(x: torch.Tensor) -> bool:
    return x.numel() <= FEW * x.shape[-1]


def _is_many(x: torch.Tensor) -> bool:
    return x.numel() >= MANY * x.shape[-1]


def _by_torch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if bias is None and weight.dtype in _HALF and is_unfoldable_row(x):
        return torch.stack([functional.linear(row.clone(), weight) for row in x])
    return functional.linear(x, weight, bias)


def is_unfoldable_row(x: torch.Tensor) -> bool:
    """Whether `x` is [sequences, 1, width] on the CPU with gaps between its sequences."""
    return (
        x.dim() == 3 and x.shape[1] == 1 and x.device.type == "cpu" and x.stride(0) != x.shape[2] and x.stride(2) == 1
    )
