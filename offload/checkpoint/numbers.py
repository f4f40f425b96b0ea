"""A checkpoint in the numbers that a plan needs: recognised, remembered, or from the model's own modules.

The modules are right by definition and take seconds, most of them imports. A known decoder is recognised by its headers
in milliseconds (`recognition`); what the modules said of any other is kept, until the files or the software change.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from offload.checkpoint.headers import read_headers
from offload.checkpoint.recognition import recognise
from offload.hardware import cache_dir, versions
from offload.io.safetensors import Entry
from offload.specs import ModelSpec

KEPT = 64  # files
_CODE = ("checkpoint", "runtime/discovery.py", "runtime/linears.py", "tiers/layout.py", "tiers/slots.py", "specs.py")
_DECIDES = ("torch", "transformers")


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """A model in numbers.

    Attributes:
        spec: units, tensors and bytes.
        weights: the name of the format that packed matrices have, or "none".
        basis: headers, or config where there are no headers and sizes follow from the configuration alone.
        unpack_nbytes: memory that products of many rows take to unpack matrices.
        notes: what a run would miss of the files, a sentence each.
    """

    spec: ModelSpec
    weights: str = "none"
    basis: str = "headers"
    unpack_nbytes: int = 0
    notes: tuple[str, ...] = ()


def numbers(directory: Path, *, dtype: str = "auto", weights: str | None = None, exact: bool = False) -> Numbers:
    """The numbers of a checkpoint, whose weights need not be here.

    Args:
        directory: with config.json, and headers or weights.
        dtype: as for `open_checkpoint`.
        weights: a format's name, as `parse_weights` takes it.
        exact: torch's own ops only, which unpack whole matrices.

    Raises:
        CheckpointError, ModelError, UsageError: see `outline`.
    """
    if not (directory / "config.json").is_file():
        return _from_modules(directory, dtype, weights, exact)
    headers = read_headers(directory)
    entries = headers.checkpoint.entries if headers.checkpoint is not None else None
    if weights in (None, "none") and (config := _config(directory)) is not None:
        spec = recognise(config, entries, dtype)
        if spec is not None:
            return Numbers(spec=spec, basis="config" if entries is None else "headers", notes=headers.notes)
    file = cache_dir() / "outlines" / f"{_digest(directory, entries, (dtype, weights, exact))}.msgpack"
    with suppress(OSError, msgspec.MsgspecError):
        return replace(msgspec.msgpack.decode(file.read_bytes(), type=Numbers), notes=headers.notes)
    found = _from_modules(directory, dtype, weights, exact)
    _keep(file, found)
    return replace(found, notes=headers.notes)


def _from_modules(directory: Path, dtype: str, weights: str | None, exact: bool) -> Numbers:
    import transformers

    from offload.checkpoint.outline import sketch
    from offload.kernels.formats.weights import parse_weights
    from offload.runtime.linears import unpack_nbytes

    transformers.utils.logging.set_verbosity_error()
    outline = sketch(directory, dtype=dtype, weights=parse_weights(weights))
    return Numbers(
        spec=outline.spec,
        weights=outline.weights,
        basis=outline.basis,
        unpack_nbytes=unpack_nbytes(outline.sources.values(), exact),
    )


def _config(directory: Path) -> dict[str, Any] | None:
    """config.json; None where it is damaged, which the modules' way reports."""
    try:
        found = json.loads((directory / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _digest(directory: Path, entries: Mapping[str, Entry] | None, options: object) -> str:
    """Of all that the numbers follow from: configuration, headers, options, and the code that makes them."""
    now = versions()
    digest = hashlib.sha256(repr((options, [now[name] for name in _DECIDES], entries is None)).encode())
    root = Path(__file__).parents[1]
    for name in _CODE:
        path = root / name
        for file in sorted(path.glob("*.py")) if path.is_dir() else [path]:
            status = file.stat()
            digest.update(f"{file} {status.st_size} {status.st_mtime_ns}\n".encode())
    for name in ("config.json", "offload.json"):
        if (directory / name).is_file():
            digest.update((directory / name).read_bytes() + b"\n")
    for e in (entries or {}).values():
        digest.update(f"{e.name} {e.dtype} {e.shape} {os.path.basename(e.path)} {e.offset}\n".encode())
    return digest.hexdigest()[:24]


def _keep(file: Path, found: Numbers) -> None:
    """Writes the file whole or not at all, and forgets the oldest ones: a cache that cannot be written is none."""
    part = file.with_suffix(f".{os.getpid()}")
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(msgspec.msgpack.encode(found))
        part.replace(file)
        for old in sorted(file.parent.glob("*.msgpack"), key=lambda f: f.stat().st_mtime, reverse=True)[KEPT:]:
            old.unlink(missing_ok=True)
