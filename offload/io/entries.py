"""What a safetensors header says, as facts: tensors with their places, and the limits of what is believed."""

from __future__ import annotations

from dataclasses import dataclass

from offload.io.extents import Extent

ITEMSIZE_BITS: dict[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip
"""safetensors dtype -> bits of one element."""

FORMAT_HEADER_NBYTES = 100_000_000  # what the format itself allows


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a header may hold: far above any published checkpoint's files, far below what would hurt.

    Attributes:
        header_nbytes: bytes of JSON; 100,000 tensors take about 12 MiB.
        tensors: in one file.
        name_nbytes: UTF-8 bytes of a tensor's name.
        rank: dimensions of one tensor.
        dimensions: of all tensors together.
        metadata_nbytes: bytes of JSON of the metadata object.
        metadata_pairs: keys in it.
    """

    header_nbytes: int = 16 << 20
    tensors: int = 120_000
    name_nbytes: int = 1024
    rank: int = 64
    dimensions: int = 524_288
    metadata_nbytes: int = 4 << 20
    metadata_pairs: int = 10_000


LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor on disk: `nbytes` bytes from byte `offset` of the file, row-major; dtype as safetensors spells it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: str
    offset: int
    nbytes: int

    @property
    def extent(self) -> Extent:
        """Where its bytes lie; not aligned."""
        return Extent(self.path, self.offset, self.nbytes)


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header: entries in the order of their bytes, which start at `data_offset` and end with the file."""

    path: str
    entries: tuple[Entry, ...]
    metadata: dict[str, str]
    data_offset: int
    file_nbytes: int
