"""Builds safetensors files, right ones and hostile ones."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

from offload.io.safetensors import ITEMSIZE_BITS


def pack(header: object, data: bytes = b"", *, nbytes: int | None = None) -> bytes:
    """A file: length, header (JSON, or the bytes themselves), data. `nbytes` lies about the header's length."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if nbytes is None else nbytes) + raw + data


def lay_out(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> tuple[dict[str, object], bytes]:
    """Header and data of tensors in order."""
    header: dict[str, object] = {}
    at = 0
    for name, (dtype, shape) in tensors.items():
        nbytes = math.prod(shape) * ITEMSIZE_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    return header, bytes(i % 251 for i in range(at))


def save(path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str] | None = None) -> Path:
    """Write a right file."""
    header, data = lay_out(tensors)
    if metadata is not None:
        header = {"__metadata__": metadata, **header}
    path.write_bytes(pack(header, data))
    return path


SMALL = {"a": ("F32", (2, 3)), "b.weight": ("BF16", (4,)), "empty": ("I64", (0, 5)), "scalar": ("U8", ())}


def tensor(dtype: object = "U8", shape: object = (4,), offsets: object = (0, 4), **more: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def one(value: object, data: bytes = b"1234", name: str = "t") -> bytes:
    return pack({name: value}, data)


def raw_one(text: str, data: bytes = b"1234") -> bytes:
    return pack(('{"t":' + text + "}").encode(), data)


GOOD = '{"dtype":"U8","shape":[4],"data_offsets":[0,4]}'
