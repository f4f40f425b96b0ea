"""A packed matrix as one run of bytes: which plane lies where, so that it is stored, read and uploaded like a tensor.

| plane | pad | plane | pad | ... |        each plane at a multiple of 64 bytes, and so is the end
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch

from offload.kernels.formats.int4 import INT4_CHUNK, Int4Weight
from offload.kernels.formats.int8 import Int8Weight
from offload.kernels.formats.lossless import LOSSLESS_BLOCK, LosslessWeight

ALIGNMENT = 64  # of planes, in bytes
KINDS = ("lossless", "int8", "int4")

Weight = LosslessWeight | Int8Weight | Int4Weight


@dataclass(frozen=True, slots=True)
class Plane:
    """One array of a packed matrix: the field it is, and its first byte."""

    field: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    at: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What the bytes of a packed matrix mean.

    Attributes:
        kind: one of KINDS.
        outputs, inputs: the matrix's shape.
        group, symmetric: of int4.
        largest: the largest exponent, of lossless.
        patches: of lossless: how many there is room for.
    """

    kind: str
    outputs: int
    inputs: int
    group: int = 0
    symmetric: bool = False
    largest: int = 0
    patches: int = 0

    @property
    def nbytes(self) -> int:
        """Of the whole run, padding included."""
        return max(_up(plane.at + plane.nbytes) for plane in self.planes())

    def with_outputs(self, outputs: int) -> Form:
        """Of so many of its rows, with room for as large a share of patches."""
        return replace(self, outputs=outputs, patches=-(-self.patches * outputs // self.outputs))

    def planes(self) -> tuple[Plane, ...]:
        """Every array, in the order of bytes."""
        found, at = [], 0
        for field, dtype, shape in self._arrays():
            found.append(Plane(field, dtype, shape, at))
            at = _up(at + found[-1].nbytes)
        return tuple(found)

    def _arrays(self) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
        rows = self.outputs
        if self.kind == "int8":
            yield "q", torch.int8, (rows, self.inputs)
            yield "scale", torch.float32, (rows,)
        elif self.kind == "int4":
            padded = _up(self.inputs, INT4_CHUNK)
            yield "packed", torch.uint8, (rows, padded // 2)
            yield "scale", torch.float16, (rows, padded // self.group)
            if not self.symmetric:
                yield "offset", torch.float16, (rows, padded // self.group)
        else:
            padded = _up(self.inputs, LOSSLESS_BLOCK)
            yield "low", torch.uint8, (rows, padded)
            yield "codes", torch.uint8, (rows, padded // 2)
            yield "patch_start", torch.int32, (rows + 1,)
            yield "patch_input", torch.int32, (self.patches,)
            yield "patch_exponent", torch.uint8, (self.patches,)

    def view(self, run: torch.Tensor) -> Weight:
        """The matrix whose bytes (uint8, at least `nbytes`, aligned) these are. Shares them."""
        return self.matrix({p.field: run[p.at : p.at + p.nbytes].view(p.dtype).view(p.shape) for p in self.planes()})

    def matrix(self, arrays: Mapping[str, torch.Tensor]) -> Weight:
        """The packed matrix that has these arrays as its fields; it may have other rows than the form."""
        fields: dict[str, Any] = dict(arrays)
        if self.kind == "int8":
            return Int8Weight(**fields)
        if self.kind == "int4":
            return Int4Weight(**{"offset": None} | fields, inputs=self.inputs, group=self.group)
        return LosslessWeight(**fields, largest=self.largest, inputs=self.inputs)

    def write(self, weight: Weight, run: torch.Tensor) -> None:
        """Puts the arrays of a packed matrix that are not there yet to their places in `run`, with zeros between them.

        Shorter lists of patches leave a gap of any content.
        """
        end = 0
        for plane in self.planes():
            source = getattr(weight, plane.field).reshape(-1)
            target = run[plane.at : plane.at + plane.nbytes].view(plane.dtype)
            if source.data_ptr() != target.data_ptr():
                target[: len(source)] = source[: len(target)]
            run[end : plane.at] = 0
            end = plane.at + plane.nbytes
        run[end : self.nbytes] = 0


def form_of(weight: Weight) -> Form:
    """The tightest form of a packed matrix."""
    if isinstance(weight, Int8Weight):
        return Form(kind="int8", outputs=weight.q.shape[0], inputs=weight.q.shape[1])
    if isinstance(weight, Int4Weight):
        symmetric = weight.offset is None
        outputs = weight.packed.shape[0]
        return Form(kind="int4", outputs=outputs, inputs=weight.inputs, group=weight.group, symmetric=symmetric)
    patches, outputs = int(weight.patch_start[-1]), weight.low.shape[0]
    return Form(kind="lossless", outputs=outputs, inputs=weight.inputs, largest=weight.largest, patches=patches)


def rows_of(weight: Weight, first: int, last: int) -> Weight:
    """Outputs `first` to `last` of a packed matrix, without a copy."""
    if isinstance(weight, Int8Weight):
        return Int8Weight(weight.q[first:last], weight.scale[first:last])
    if isinstance(weight, Int4Weight):
        offset = None if weight.offset is None else weight.offset[first:last]
        part = weight.packed[first:last], weight.scale[first:last], offset
        return Int4Weight(*part, weight.inputs, weight.group)
    return LosslessWeight(
        low=weight.low[first:last],
        codes=weight.codes[first:last],
        largest=weight.largest,
        patch_start=weight.patch_start[first : last + 1],
        patch_input=weight.patch_input,
        patch_exponent=weight.patch_exponent,
        inputs=weight.inputs,
    )


def take_rows(weight: Weight, ids: torch.Tensor) -> Weight:
    """Outputs `ids` (1-D) of a packed matrix, copied: what an embedding needs of a table."""
    if isinstance(weight, Int8Weight):
        return Int8Weight(weight.q[ids], weight.scale[ids])
    if isinstance(weight, Int4Weight):
        offset = None if weight.offset is None else weight.offset[ids]
        return Int4Weight(weight.packed[ids], weight.scale[ids], offset, weight.inputs, weight.group)
    first = weight.patch_start[ids].long()
    counts = weight.patch_start[ids + 1].long() - first
    start = torch.zeros(len(ids) + 1, dtype=torch.int64, device=ids.device)
    start[1:] = counts.cumsum(0)
    at = torch.arange(int(start[-1]), device=ids.device) + torch.repeat_interleave(first - start[:-1], counts)
    return LosslessWeight(
        low=weight.low[ids],
        codes=weight.codes[ids],
        largest=weight.largest,
        patch_start=start.to(torch.int32),
        patch_input=weight.patch_input[at],
        patch_exponent=weight.patch_exponent[at],
        inputs=weight.inputs,
    )


def outputs_of(weight: Weight) -> int:
    """Rows of the matrix."""
    if isinstance(weight, Int8Weight):
        return weight.q.shape[0]
    return (weight.packed if isinstance(weight, Int4Weight) else weight.low).shape[0]


def _up(nbytes: int, to: int = ALIGNMENT) -> int:
    return -(-nbytes // to) * to
