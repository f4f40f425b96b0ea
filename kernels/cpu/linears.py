"""Products of one x with several matrices in any formats, in one call: queries, keys and values, or gate and up."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from offload.kernels.cpu import linear, linear_int4, linear_int8, linear_lossless
from offload.kernels.cpu.several import Call, run
from offload.kernels.formats.int4 import Int4Weight
from offload.kernels.formats.int8 import Int8Weight
from offload.kernels.formats.lossless import LosslessWeight
from offload.kernels.reference.linear import Operand

_OF: dict[type, tuple[Callable[..., Call], Callable[..., str | None]]] = {
    Int8Weight: (linear_int8.plan, linear_int8.refuses),
    Int4Weight: (linear_int4.plan, linear_int4.refuses),
    LosslessWeight: (linear_lossless.plan, linear_lossless.refuses),
}
_PLAIN = linear.plan, linear.refuses


def refuses(x: torch.Tensor, operands: Sequence[Operand]) -> str | None:
    """Why `linears` would not take these; None when it does."""
    for weight, bias in operands:
        if (why := _OF.get(type(weight), _PLAIN)[1](x, weight, bias)) is not None:
            return why
    return None


def linears(x: torch.Tensor, operands: Sequence[Operand]) -> list[torch.Tensor]:
    """See offload.kernels.reference.linears; the bits of the products one by one."""
    return run([_OF.get(type(weight), _PLAIN)[0](x, weight, bias) for weight, bias in operands])
