"""Packs matrices while a model is loaded: elements come in as they are read, one run of bytes goes out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod

import torch

from offload.errors import PackingError
from offload.kernels.chosen import Kernels
from offload.kernels.formats.form import Form, LosslessWeight, Weight, rows_of
from offload.tiers.host import Scratch
from offload.tiers.layout import Source
from offload.tiers.transit import Put, gather

BLOCK = 1 << 20  # weights that an error is computed of at a time


def pack(matrix: torch.Tensor, form: Form, kernels: Kernels) -> Weight:
    """A matrix in the kind of `form`."""
    if form.kind == "lossless":
        return kernels.run("pack_lossless", matrix)  # type: ignore[no-any-return]
    if form.kind == "int8":
        return kernels.run("quantize_int8", matrix)  # type: ignore[no-any-return]
    return kernels.run("quantize_int4", matrix, form.group, form.symmetric)  # type: ignore[no-any-return]


def pack_into(room: torch.Tensor, matrix: torch.Tensor, form: Form, kernels: Kernels) -> Weight:
    """The same, with what is large of a lossless one where `form` has it in `room` (uint8) already."""
    if form.kind != "lossless":
        return pack(matrix, form, kernels)
    low, codes = (room[p.at : p.at + p.nbytes].view(p.shape) for p in form.planes()[:2])
    return kernels.run("pack_lossless", matrix, None, (low, codes))  # type: ignore[no-any-return]


def error_of(matrix: torch.Tensor, weight: Weight, kernels: Kernels) -> float:
    """The Frobenius norm of what packing changed, over the matrix's own; block by block, in little memory."""
    wrong = whole = 0.0
    step = max(1, BLOCK // matrix.shape[1])
    for first in range(0, len(matrix), step):
        block = matrix[first : first + step].float()
        got = kernels.unpack(rows_of(weight, first, first + len(block)), torch.float32)
        wrong += float((got - block).square_().sum())
        whole += float(block.square_().sum())
    return (wrong / whole) ** 0.5 if whole else 0.0


def pack_to(source: Source, kernels: Kernels, scratch: Scratch, put: Callable[[Weight, Form, float], None]) -> Put:
    """A receiver of a matrix's elements that packs it when they are all there.

    Args:
        scratch: where the plain matrix lies meanwhile.
        put: called once, with the packed matrix, what its form has become, and its error.

    Raises:
        PackingError: from the receiver, when the matrix does not fit into the room that was set aside for it.
    """
    form = source.form
    assert form is not None

    def receive(matrix: torch.Tensor) -> None:
        weight = pack(matrix, form, kernels)
        if not isinstance(weight, LosslessWeight):
            put(weight, form, error_of(matrix, weight, kernels))
            return
        if (patches := int(weight.patch_start[-1])) > form.patches:
            raise PackingError(
                f"{source.name} has {patches:,} weights of unusual exponents among {prod(source.shape):,}; room was "
                f"set aside for {form.patches:,}. Pack the model once with offload pack, which keeps such a matrix "
                "as it is, or use --weights none"
            )
        put(weight, replace(form, largest=weight.largest), 0.0)

    return gather(source, scratch, receive)
