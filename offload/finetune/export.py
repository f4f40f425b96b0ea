"""Writes a trained model in Hugging Face layout, under the names and in the files' order of its checkpoint."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from offload.errors import CheckpointError
from offload.io.engine import Engine
from offload.io.extents import ALIGNMENT
from offload.io.safetensors import Entry
from offload.tiers.layout import Source
from offload.tiers.sink import Sink

SAFETENSORS = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64",
               torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}  # fmt: skip
SHARD_NBYTES = 5 * 10**9
_Piece = tuple[int, int, torch.dtype, Callable[[], torch.Tensor]]  # bytes of a file: first, end; and what goes there


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor to write: runs of elements of the model's parameters, one after the other, asked for when it is time."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    runs: tuple[Callable[[], torch.Tensor], ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def export_checkpoint(
    root: Any,
    sources: Mapping[str, Source],
    entries: Mapping[str, Entry],
    weights: Mapping[str, torch.Tensor],
    folder: Path,
    engine: Engine,
) -> None:
    """Writes config and weights.

    Args:
        root: the model, for its configuration and buffers.
        sources: where each parameter lay in the checkpoint.
        entries: the checkpoint's tensors.
        weights: parameter name -> its present value, which is asked for once, when it is written.
        folder: an empty one.
    """
    export_tensors(_stored(sources, entries, dict(root.named_buffers()), weights), folder, engine)
    _write_config(root, folder)


def export_module(root: Any, folder: Path, engine: Engine) -> None:
    """The same for a module that was built by the user: its state dict, tied tensors once."""
    seen: set[tuple[int, int]] = set()
    found = []
    for name, tensor in root.state_dict().items():
        key = (tensor.data_ptr(), tensor.numel())
        if key in seen and tensor.numel():
            continue
        seen.add(key)
        found.append(stored(name, tensor))
    export_tensors(found, folder, engine)
    _write_config(root, folder)


def stored(name: str, tensor: torch.Tensor) -> _Stored:
    """A whole tensor, to be written under a name."""
    return _Stored(name, tensor.dtype, tuple(tensor.shape), (lambda: tensor,))


def export_tensors(
    tensors: Sequence[_Stored], folder: Path, engine: Engine, limit: int = SHARD_NBYTES, stem: str = "model"
) -> None:
    """One safetensors file, or several and their index."""
    files: list[list[_Stored]] = [[]]
    for tensor in sorted(tensors, key=lambda t: -t.dtype.itemsize):  # each at a multiple of its element
        if files[-1] and sum(t.nbytes for t in files[-1]) + tensor.nbytes > limit:
            files.append([])
        files[-1].append(tensor)
    names = (
        [f"{stem}.safetensors"]
        if len(files) == 1
        else [f"{stem}-{k:05d}-of-{len(files):05d}.safetensors" for k in range(1, len(files) + 1)]
    )
    for name, inside in zip(names, files, strict=True):
        _write_file(folder / name, inside, engine)
    if len(files) > 1:
        total = sum(t.nbytes for t in tensors)
        index = {t.name: name for name, inside in zip(names, files, strict=True) for t in inside}
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2, sort_keys=True)
        (folder / f"{stem}.safetensors.index.json").write_text(text)


def _write_file(path: Path, tensors: Sequence[_Stored], engine: Engine) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for t in tensors:
        header[t.name] = {"dtype": SAFETENSORS[t.dtype], "shape": list(t.shape), "data_offsets": [end, end + t.nbytes]}
        end += t.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    head = -(-(len(text) + 8) // ALIGNMENT) * ALIGNMENT
    with Sink(path, engine, head, end) as sink:
        for t in tensors:
            for run in t.runs:
                sink.append(run())
        sink.finish((head - 8).to_bytes(8, "little") + text.ljust(head - 8))


def _stored(
    sources: Mapping[str, Source],
    entries: Mapping[str, Entry],
    buffers: Mapping[str, torch.Tensor],
    weights: Mapping[str, torch.Tensor],
) -> list[_Stored]:
    """Every tensor of the checkpoint, made of the model's parameters. Copies of tied ones are left out."""
    pieces: dict[str, list[_Piece]] = {}
    for name, source in sources.items():
        for piece in source.pieces:
            extent, end = piece.extent, piece.start + piece.count

            def run(name: str = name, start: int = piece.start, end: int = end) -> torch.Tensor:
                return weights[name].detach().reshape(-1)[start:end]

            pieces.setdefault(extent.path, []).append((extent.offset, extent.end, source.dtype, run))
    for here in pieces.values():
        here.sort(key=_start)
    found = []
    for name, entry in entries.items():
        begin, end = entry.extent.offset, entry.extent.end
        here = pieces.get(entry.path, [])
        inside = here[bisect_left(here, begin, key=_start) : bisect_left(here, end, key=_start)]
        if inside:
            if [p[0] for p in inside] != [begin, *(p[1] for p in inside[:-1])] or inside[-1][1] != end:
                raise CheckpointError(f"{name} is not made of whole parameters, so it cannot be written back")
            found.append(_Stored(name, inside[0][2], entry.shape, tuple(p[3] for p in inside)))
        elif name in buffers:
            found.append(stored(name, buffers[name]))
    return found


def _start(piece: _Piece) -> int:
    return piece[0]


def _write_config(model: Any, folder: Path) -> None:
    for part in ("generation_config", "config"):  # config.json last: with it the folder is a model
        config = getattr(model, part, None)
        if hasattr(config, "save_pretrained"):
            config.save_pretrained(folder)
