"""What products with matrices of other layouts take: [inputs, outputs], and stacks with a matrix for each expert."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from offload.probes.area import Area
from offload.probes.linears import fitting
from offload.probes.sampling import Meter, Run
from offload.probes.subject import Shape
from offload.probes.tables import curve_of, ours_and_torchs, table_of
from offload.profile import OpTable
from offload.runtime import conv1d


def transposed_tables(
    shapes: Sequence[Shape],
    dtype: torch.dtype,
    rows: Sequence[int],
    torch_rows: Sequence[int],
    area: Area,
    meter: Meter,
) -> Iterator[OpTable]:
    """Products with matrices that lie as [inputs, outputs], as Conv1D has them: by the kernel and by torch."""
    for outputs, inputs in shapes:
        part = fitting(inputs, outputs * dtype.itemsize, area)  # of the inputs: time grows with them, too
        if not part:
            continue
        weights = area.copies((part, outputs), dtype)
        for kernels, implementation, amounts in ours_and_torchs("linear_transposed", rows, torch_rows, meter):
            modules = [_conv1d(weight) for weight in weights]
            if not kernels.exact:
                conv1d.install(nn.ModuleList(modules), kernels)

            def calls(count: int, modules: Sequence[nn.Module] = modules, width: int = part) -> list[Run]:
                x = torch.full((count, width), 0.5, dtype=dtype, device=meter.device)
                return [partial(module, x) for module in modules]

            curve = curve_of(amounts, calls, meter, inputs / part)
            yield table_of("linear_transposed", implementation, str(dtype)[6:], (outputs, inputs), curve, meter)


def _conv1d(weight: torch.Tensor) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        module = Conv1D(weight.shape[1], weight.shape[0])
    bias = torch.full((weight.shape[1],), 0.5, dtype=weight.dtype, device=weight.device)
    for name, value in (("weight", weight), ("bias", bias)):
        module._parameters[name] = nn.Parameter(value, requires_grad=False)
    return module  # type: ignore[no-any-return]


def group_tables(
    stacks: Mapping[Shape, int],
    dtype: torch.dtype,
    rows: Sequence[int],
    torch_rows: Sequence[int],
    area: Area,
    meter: Meter,
) -> Iterator[OpTable]:
    """Products by experts, each with so many rows of its own; the seconds of one of them.

    Args:
        stacks: (outputs, inputs) of one expert -> how many of them are multiplied by in one call.
    """
    for (outputs, inputs), wanted in stacks.items():
        count = min(wanted, area.nbytes // (2 * outputs * inputs * dtype.itemsize))
        if not count:
            continue
        weights = area.copies((count, outputs, inputs), dtype)
        for kernels, implementation, amounts in ours_and_torchs("linear_groups", rows, torch_rows, meter):
            choice, x = kernels.choice("linear_groups"), torch.ones(count, inputs, dtype=dtype, device=meter.device)
            if not kernels.exact and choice.refuses()(x, weights[0], (1,) * count) is not None:
                continue
            multiply = _grouped if kernels.exact else choice.function()

            def calls(each: int, multiply: Any = multiply, stacks: Any = weights, count: int = count) -> list[Run]:
                x = torch.full((each * count, stacks[0].shape[2]), 0.5, dtype=dtype, device=meter.device)
                return [partial(multiply, x, stack, (each,) * count) for stack in stacks]

            curve = curve_of(amounts, calls, meter, 1 / count)
            yield table_of("linear_groups", implementation, str(dtype)[6:], (outputs, inputs), curve, meter)


def _grouped(x: torch.Tensor, weight: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """As transformers multiplies by experts where no kernel of ours does."""
    ends = torch.tensor(rows, device=x.device).cumsum(0, dtype=torch.int32)
    return functional.grouped_mm(x, weight.transpose(-2, -1), offs=ends)
