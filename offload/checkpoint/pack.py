"""Writes a checkpoint with its matrices in fewer bits: once, as fast as the disk lets, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import msgspec
import torch

from offload.checkpoint import open_checkpoint
from offload.checkpoint.conversion import DTYPES
from offload.checkpoint.finding import MANIFEST
from offload.checkpoint.manifest import METHOD, VERSION, Manifest, PackedTensor
from offload.checkpoint.packable import packable
from offload.checkpoint.target import check_target
from offload.errors import StorageError
from offload.io.engine import Engine
from offload.io.extents import ALIGNMENT
from offload.kernels.chosen import Kernels
from offload.kernels.formats.form import Form, form_of
from offload.kernels.formats.weights import WeightFormat
from offload.tiers import transit
from offload.tiers.durable import sync_folder
from offload.tiers.layout import Source
from offload.tiers.packing import error_of, pack_into
from offload.tiers.sink import Sink
from offload.tiers.transit import Put
from offload.tiers.wholes import bring_wholes
from offload.units import MIB

WORTH = 0.9  # of a matrix's plain bytes: one that does not get smaller than this stays as it is
_SMALL_FILE = 64 * MIB  # tokenizers and the like; weights in other formats are larger
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SKIPPED = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")


@dataclass(kw_only=True)
class PackReport:
    """What packing did.

    Attributes:
        read_nbytes, written_nbytes: of weights.
        seconds: from the first read until everything was durable.
        packed: parameter -> relative error of the matrix (Frobenius norm of the difference over its own); 0 for
            lossless.
        kept: matrices that would not have got smaller.
    """

    read_nbytes: int = 0
    written_nbytes: int = 0
    seconds: float = 0.0
    packed: dict[str, float] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)


def pack_checkpoint(
    directory: Path,
    out: Path,
    format: WeightFormat,
    *,
    engine: Engine,
    progress: Callable[[str, int, int], None] | None = None,
) -> PackReport:
    """Packs the checkpoint in `directory` into the new folder `out`.

    Raises:
        UsageError: `out` has something in it, or the checkpoint is packed already.
        StorageError: no room, or the disk failed. Nothing is left behind then, and nothing after a kill.
    """
    check_target(directory, out, 0)
    opened = open_checkpoint(directory, engine)
    began = time.perf_counter()
    names = list(packable(opened.anatomy, opened.sources, opened.model.config, format, blocks_only=False))
    kernels = Kernels("cpu", exact=False)
    check_target(directory, out, _expected_nbytes(opened.sources, names, format))
    is_new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"the folder cannot be made: {error.strerror}", path=str(out), errno=error.errno) from error
    try:
        buffers = {n: b for n, b in opened.model.state_dict().items() if n not in opened.sources and not b.is_meta}
        writer = _Writer(opened.sources, names, format, kernels)
        report = writer.write(out, engine, buffers, progress)
        _copy_small_files(directory, out)
        _write(out / MANIFEST, msgspec.json.format(msgspec.json.encode(writer.manifest), indent=1))
        config = json.loads((directory / "config.json").read_bytes())
        config["quantization_config"] = {"quant_method": METHOD, "weights": str(format)}
        config.setdefault("dtype", str(opened.model.dtype).removeprefix("torch."))
        _write(out / "config.json", json.dumps(config, indent=2).encode())  # last: without it, it is no model
        sync_folder(out)
    except BaseException:
        _remove(out, is_new)
        raise
    report.seconds = time.perf_counter() - began
    return report


class _Writer:
    """One safetensors file: packed matrices first, then what stays plain, widest elements first, so that all lie at
    multiples of what they are made of."""

    def __init__(self, sources: dict[str, Source], names: list[str], format: WeightFormat, kernels: Kernels) -> None:
        self._sources, self._names, self._format, self._kernels = sources, names, format, kernels
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt", "weights": str(format)}}
        self.manifest = Manifest(version=VERSION, weights=str(format), tensors={})

    def write(
        self, out: Path, engine: Engine, buffers: dict[str, torch.Tensor], progress: Callable[..., None] | None
    ) -> PackReport:
        report = PackReport(read_nbytes=sum(s.read_nbytes for s in self._sources.values()))
        pool = transit.buffers()
        done = 0

        def count(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            if progress is not None:
                progress("packing", min(done, report.read_nbytes), report.read_nbytes)

        head_nbytes = self._head_nbytes(buffers)
        try:
            room = _expected_nbytes(self._sources, self._names, self._format)
            longest = max((_room_nbytes(self._sources[n], self._format) for n in self._names), default=0)
            with Sink(out / "model.safetensors", engine, head_nbytes, room, longest) as sink:
                bring_wholes([(self._sources[n], self._packs(n, sink, report)) for n in self._names], engine, count)
                rest = [n for n in self._sources if n not in self._names] + report.kept
                rest.sort(key=lambda n: -self._sources[n].dtype.itemsize)
                transit.bring([(self._sources[n], self._keeps(n, sink)) for n in rest], engine, pool, count)
                for name, tensor in sorted(buffers.items(), key=lambda item: -item[1].element_size()):
                    self._place(name, tensor.dtype, tuple(tensor.shape), sink)
                    sink.append(tensor.contiguous())
                report.written_nbytes = sink.nbytes
                sink.finish(self._head(head_nbytes))
        finally:
            pool.close()
        return report

    def _packs(self, name: str, sink: Sink, report: PackReport) -> Callable[[torch.Tensor], None]:
        source, plan = self._sources[name], self._format.form(self._sources[name].shape)

        def put(matrix: torch.Tensor) -> None:
            room = sink.room(_room_nbytes(source, self._format))
            weight = pack_into(room, matrix, plan, self._kernels)
            form = form_of(weight)
            if form.nbytes > WORTH * matrix.nbytes:
                report.kept.append(name)
                return
            report.packed[name] = error_of(matrix, weight, self._kernels) if self._format.is_approximate else 0.0
            self._place(name, torch.uint8, (form.nbytes,), sink)
            self.manifest.tensors[name] = _described(form, source.dtype)
            form.write(weight, room)
            sink.grow(form.nbytes)

        return put

    def _keeps(self, name: str, sink: Sink) -> Put:
        source = self._sources[name]

        def put(start: int, values: torch.Tensor) -> None:
            if start == 0:
                self._place(name, source.dtype, source.shape, sink)
            sink.append(values)

        return put

    def _place(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], sink: Sink) -> None:
        begin = sink.nbytes
        end = begin + prod(shape) * dtype.itemsize
        self._header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}

    def _head_nbytes(self, buffers: dict[str, torch.Tensor]) -> int:
        """Room for the header, whatever the numbers in it will be."""
        names = [*self._sources, *buffers]
        ranks = sum(len(s.shape) for s in self._sources.values()) + sum(b.dim() for b in buffers.values())
        nbytes = 8 + 256 + sum(len(json.dumps(n)) + 100 for n in names) + 16 * ranks
        return -(-nbytes // ALIGNMENT) * ALIGNMENT

    def _head(self, nbytes: int) -> bytes:
        text = json.dumps(self._header, separators=(",", ":")).encode()
        assert len(text) + 8 <= nbytes
        return (nbytes - 8).to_bytes(8, "little") + text.ljust(nbytes - 8)


def _described(form: Form, dtype: torch.dtype) -> PackedTensor:
    return PackedTensor(
        kind=form.kind, outputs=form.outputs, inputs=form.inputs, dtype=str(dtype).removeprefix("torch."),
        group=form.group, symmetric=form.symmetric, largest=form.largest, patches=form.patches,
    )  # fmt: skip


def _room_nbytes(source: Source, format: WeightFormat) -> int:
    """What a matrix takes that is worth packing: patches come last, and nobody knows how many before."""
    return max(format.form(source.shape).nbytes, int(WORTH * source.nbytes))


def _expected_nbytes(sources: dict[str, Source], names: list[str], format: WeightFormat) -> int:
    """What will be written, about: a matrix of unusual weights takes more."""
    packed = set(names)
    return sum(min(s.nbytes, format.form(s.shape).nbytes) if n in packed else s.nbytes for n, s in sources.items())


def _copy_small_files(directory: Path, out: Path) -> None:
    """Tokenizer, generation settings and what else is not weights."""
    for path in sorted(directory.iterdir()):
        if path.name == "config.json" or path.name.startswith(".") or path.name.endswith(_SKIPPED):
            continue
        if path.is_file() and path.stat().st_size <= _SMALL_FILE:
            shutil.copyfile(path, out / path.name)


def _write(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _remove(out: Path, is_new: bool) -> None:
    """Undoes what was written: the folder was empty or was not there."""
    for path in _files(out):
        path.unlink(missing_ok=True)
    if is_new and out.is_dir():
        out.rmdir()


def _files(out: Path) -> Iterator[Path]:
    return (path for path in list(out.iterdir()) if path.is_file()) if out.is_dir() else iter(())
