"""What products with matrices of other layouts take: [inputs, outputs], and stacks with a matrix for each expert."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from offload.kernels.chosen import Kernels
from offload.probes.area import Area
from offload.probes.linears import fitting, table_of
from offload.probes.sampling import Meter
from offload.probes.subject import Shape
from offload.profile import Curve, OpTable
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
    kinds = ((Kernels(meter.device, exact=False), rows), (Kernels(meter.device, exact=True), torch_rows))
    for outputs, inputs in shapes:
        part = fitting(inputs, outputs * dtype.itemsize, area)  # of the inputs: time grows with them, too
        if not part:
            continue
        weights = area.copies((part, outputs), dtype)
        for kernels, amounts in kinds:
            implementation = kernels.choice("linear_transposed").implementation
            if implementation == "torch" and not kernels.exact:  # it is measured with the exact ones
                continue
            modules = [_conv1d(weight) for weight in weights]
            if not kernels.exact:
                conv1d.install(nn.ModuleList(modules), kernels)
            points = []
            with torch.no_grad():
                for n in amounts:
                    x = torch.full((n, part), 0.5, dtype=dtype, device=meter.device)
                    sample = meter.time(*(partial(module, x) for module in modules)).scaled(inputs / part)
                    points.append((n, sample.seconds, sample.spread))
            yield table_of(
                "linear_transposed", implementation, str(dtype)[6:], (outputs, inputs), Curve.of(points), meter
            )


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
    kinds = ((Kernels(meter.device, exact=False), rows), (Kernels(meter.device, exact=True), torch_rows))
    for (outputs, inputs), wanted in stacks.items():
        count = min(wanted, area.nbytes // (2 * outputs * inputs * dtype.itemsize))
        if not count:
            continue
        weights = area.copies((count, outputs, inputs), dtype)
        for kernels, amounts in kinds:
            choice, x = kernels.choice("linear_groups"), torch.ones(count, inputs, dtype=dtype, device=meter.device)
            is_ours = choice.implementation != "torch" and choice.refuses()(x, weights[0], (1,) * count) is None
            if is_ours is kernels.exact:  # torch's is measured with the exact ones
                continue
            multiply, points = choice.function() if is_ours else _grouped, []
            for n in amounts:
                x = torch.full((n * count, inputs), 0.5, dtype=dtype, device=meter.device)
                with torch.no_grad():
                    sample = meter.time(*(partial(multiply, x, w, (n,) * count) for w in weights)).scaled(1 / count)
                points.append((n, sample.seconds, sample.spread))
            kind = choice.implementation if is_ours else "torch"
            yield table_of("linear_groups", kind, str(dtype)[6:], (outputs, inputs), Curve.of(points), meter)


def _grouped(x: torch.Tensor, weight: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """As transformers multiplies by experts where no kernel of ours does."""
    ends = torch.tensor(rows, device=x.device).cumsum(0, dtype=torch.int32)
    return functional.grouped_mm(x, weight.transpose(-2, -1), offs=ends)
