"""What products with a model's own matrices take, by rows and format, through the very module that runs them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import nn

from offload.kernels.chosen import Kernels
from offload.kernels.formats.form import Weight, form_of, outputs_of, rows_of
from offload.kernels.formats.weights import parse_weights
from offload.probes.area import Area
from offload.probes.sampling import Meter, Run
from offload.probes.subject import Shape
from offload.probes.tables import curve_of, ours_and_torchs, table_of
from offload.profile import Curve, OpTable
from offload.runtime import linears
from offload.runtime.packed import Packed
from offload.tiers.packing import pack

UNPACK = {"lossless": "unpack_lossless", "int8": "dequantize_int8", "int4": "dequantize_int4"}


def plain_tables(
    shapes: Sequence[Shape],
    dtype: torch.dtype,
    rows: Sequence[int],
    torch_rows: Sequence[int],
    area: Area,
    meter: Meter,
) -> Iterator[OpTable]:
    """Products with plain weights: by the kernel, if there is one, and by torch."""
    for outputs, inputs in shapes:
        part = fitting(outputs, inputs * dtype.itemsize, area)
        if not part:
            continue
        weights = area.copies((part, inputs), dtype)
        for kernels, implementation, amounts in ours_and_torchs("linear", rows, torch_rows, meter):
            calls = partial(product, weights, kernels=kernels)
            curve = curve_of(amounts, calls, meter, outputs / part)
            yield table_of("linear", implementation, str(dtype)[6:], (outputs, inputs), curve, meter)


def packed_tables(
    shapes: Sequence[Shape], format: str, dtype: torch.dtype, rows: Sequence[int], area: Area, meter: Meter
) -> Iterator[OpTable]:
    """Products with packed weights, and unpacking them as products of many rows do, 16 MiB at a time.

    What lies in the area is overwritten.
    """
    wanted = parse_weights(format)
    assert wanted is not None
    host, kernels = Kernels("cpu", exact=False), Kernels(meter.device, exact=False)
    for outputs, inputs in shapes:
        part = fitting(outputs, inputs * 2, area)
        if not part:
            continue
        random = torch.empty(part, inputs, dtype=dtype).normal_(std=0.02, generator=torch.Generator().manual_seed(0))
        packed = pack(random, wanted.form((part, inputs)), host)
        form = form_of(packed)
        run = torch.zeros(form.nbytes, dtype=torch.uint8)
        form.write(packed, run)
        views = area.carve(form.nbytes, lambda where, run=run, form=form: form.view(where.copy_(run)))  # type: ignore[misc]
        faces = [Packed(v, kernels, (part, inputs), dtype, torch.device(meter.device)) for v in views]
        kind, scale = form.kind, outputs / part
        implementation = kernels.choice(f"linear_{kind}").implementation
        curve = curve_of(rows, partial(product, faces, kernels=kernels), meter, scale)
        yield table_of(f"linear_{kind}", implementation, format, (outputs, inputs), curve, meter)
        whole = meter.time(*(partial(_unpack, view, dtype, kernels) for view in views)).scaled(scale)
        op = UNPACK[kind]
        once = Curve.of([(1, whole.seconds, whole.spread)])
        yield table_of(op, kernels.choice(op).implementation, format, (outputs, inputs), once, meter)


def product(weights: Sequence[torch.Tensor], rows: int, kernels: Kernels) -> tuple[Run, ...]:
    """Calls of `x W^T`, one for each weight, through modules of a model; for use within `no_grad`."""
    shape, dtype = tuple(weights[0].shape), weights[0].dtype
    root = nn.ModuleList(_module(shape, weight) for weight in weights)  # type: ignore[arg-type]
    linears.install(root, kernels, has_faces=type(weights[0]) is Packed)
    x = torch.full((rows, shape[1]), 0.5, dtype=dtype, device=weights[0].device)
    return tuple(partial(module, x) for module in root)


def _module(shape: Shape, weight: torch.Tensor) -> nn.Linear:
    module = nn.Linear(shape[1], shape[0], bias=False, device="meta")
    is_packed = type(weight) is Packed
    module._parameters["weight"] = weight if is_packed else nn.Parameter(weight, requires_grad=False)  # type: ignore[assignment]
    return module


def _unpack(weight: Weight, dtype: torch.dtype, kernels: Kernels) -> None:
    outputs, step = outputs_of(weight), max(1, linears.BLOCK_NBYTES // (form_of(weight).inputs * dtype.itemsize))
    for first in range(0, outputs, step):
        kernels.unpack(rows_of(weight, first, min(outputs, first + step)), dtype)


def fitting(outputs: int, row_nbytes: int, area: Area) -> int:
    """Outputs of a matrix that fit twice into the area: all, but of the largest; time grows with them."""
    return min(outputs, area.nbytes // 2 // (row_nbytes + 16))
