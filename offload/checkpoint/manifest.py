"""What a packed checkpoint says of itself: beside its weights lies offload.json with the form of every packed matrix.

The weights are one safetensors file. A packed matrix is a run of bytes in it (dtype U8, one dimension, at a multiple of
64 bytes), everything else is stored as the model uses it, all under the model's own names. config.json names the
format under quantization_config, so that other readers refuse it instead of reading noise.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from math import prod
from pathlib import Path

import msgspec
import torch

from offload.checkpoint.conversion import stored_dtype
from offload.checkpoint.finding import MANIFEST
from offload.errors import CheckpointError, UsageError
from offload.io.safetensors import Entry
from offload.kernels.formats.form import ALIGNMENT, KINDS, Form
from offload.kernels.formats.names import GROUPS
from offload.kernels.formats.weights import WeightFormat
from offload.tiers.layout import Piece, Source

METHOD = "offload"  # quant_method in config.json
VERSION = 1
_MOST_NBYTES = 64 << 20


class PackedTensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One packed matrix: dtype is the model's, the rest are Form's fields."""

    kind: str
    outputs: int
    inputs: int
    dtype: str
    group: int = 0
    symmetric: bool = False
    largest: int = 0
    patches: int = 0

    def form(self) -> Form:
        """Raises ValueError where the fields make no sense together."""
        is_int4 = self.kind == "int4"
        right = (
            self.kind in KINDS
            and 0 < self.outputs < 2**31
            and 0 < self.inputs < 2**31
            and self.group in (GROUPS if is_int4 else (0,))
            and 0 <= self.largest < 256
            and 0 <= self.patches <= self.outputs * self.inputs
            and self.dtype in ("bfloat16", "float16", "float32")
        )
        if not right:
            raise ValueError(f"{self} makes no sense")
        return Form(
            kind=self.kind, outputs=self.outputs, inputs=self.inputs, group=self.group, symmetric=self.symmetric,
            largest=self.largest, patches=self.patches,
        )  # fmt: skip


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file.

    Attributes:
        weights: the format's name.
        tensors: the packed matrices, by parameter.
    """

    version: int
    weights: str
    tensors: dict[str, PackedTensor]

    def locate(self, entries: Mapping[str, Entry], wanted: WeightFormat | None) -> dict[str, Source]:
        """The source of every tensor of the checkpoint.

        Raises:
            UsageError: another format was asked for than the checkpoint has.
            CheckpointError: manifest and weights disagree.
        """
        if wanted is not None and str(wanted) != self.weights:
            raise UsageError(
                f"weights={str(wanted)!r} was asked for, but this checkpoint is packed as {self.weights}; leave it "
                "out, or use the checkpoint it was packed from"
            )
        if lost := sorted(set(self.tensors) - set(entries)):
            raise CheckpointError(f"{MANIFEST} names {lost[0]}, which the weights do not have; pack the model again")
        return {name: self._source(entry) for name, entry in entries.items()}

    def _source(self, entry: Entry) -> Source:
        packed = self.tensors.get(entry.name)
        dtype = stored_dtype(entry)
        if packed is None:
            return Source(entry.name, dtype, entry.shape, (Piece(entry.extent, dtype, 0, prod(entry.shape)),))
        try:
            form = packed.form()
        except ValueError as error:
            raise CheckpointError(f"{MANIFEST}: {entry.name}: {error}") from None
        if dtype != torch.uint8 or entry.shape != (form.nbytes,) or entry.offset % ALIGNMENT:
            raise CheckpointError(
                f"{entry.path}: {entry.name} is {entry.dtype} {list(entry.shape)} at byte {entry.offset:,}, but "
                f"{MANIFEST} describes {form.nbytes:,} packed bytes at a multiple of {ALIGNMENT}; pack the model again"
            )
        piece = Piece(entry.extent, torch.uint8, 0, form.nbytes)
        shape = packed.outputs, packed.inputs
        return Source(entry.name, getattr(torch, packed.dtype), shape, (piece,), form, is_stored_packed=True)


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest of a packed checkpoint; None for any other.

    Raises:
        CheckpointError: it is broken, or of a version that is not known.
    """
    path = directory / MANIFEST
    if not path.is_file():
        return None
    if os.path.getsize(path) > _MOST_NBYTES:
        raise CheckpointError(f"{path} has {os.path.getsize(path):,} bytes; no manifest is that long")
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, OSError) as error:
        raise CheckpointError(f"{path} is no manifest of a packed checkpoint: {error}") from error
    if manifest.version != VERSION:
        raise CheckpointError(f"{path} has version {manifest.version}; this is offload for version {VERSION}")
    return manifest
