"""Where each tensor of a model lies in its checkpoint, under transformers' own rules for renaming and merging.

transformers stores some models under other names or in other shapes than it runs them (experts one by one, say) and
describes the difference by conversion operations. To learn what they do to bytes without loading any, the operations
run on row numbers instead of weights: each stored matrix becomes a column of distinct integers, and the integers that
come out say which stored row is which row of the model's tensor. Runs of consecutive rows are pieces to read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import nn

from offload.errors import CheckpointError, ModelError
from offload.io.extents import Extent
from offload.io.safetensors import Entry
from offload.tiers.layout import Piece, Source

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_STRIDE = 1 << 40  # more rows than any tensor has


def locate(model: nn.Module, entries: Mapping[str, Entry], dtype: torch.dtype) -> dict[str, Source]:
    """The source of every parameter and buffer that the checkpoint holds, by its name in the model's state dict.

    Args:
        model: a transformers model, on meta.
        entries: the checkpoint's tensors.
        dtype: what parameters are loaded as, but for those that the model keeps in float32.

    Raises:
        ModelError: a tensor is stored in a layout whose rows are not the model's rows.
        CheckpointError: a shape or dtype does not fit the model.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    wanted = model.state_dict()
    prefix = getattr(model, "base_model_prefix", None)
    targets = _Targets(model, wanted, dtype)
    sources: dict[str, Source] = {}
    merged: dict[str, tuple[Any, list[tuple[str, Entry]]]] = {}
    for key in sorted(entries, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, wanted)
        if name not in wanted and key in wanted:
            name, pattern = rename_source_key(key, [], [], base_model_prefix=prefix, meta_state_dict=wanted)
        if name not in wanted:
            continue  # transformers ignores it too
        if pattern is None:
            sources[name] = targets.plain(name, entries[key])
        else:
            converter, found = merged.setdefault(name, (by_pattern[pattern], []))
            found.append((pattern, entries[key]))
    known: _Known = {}
    for name, (converter, found) in merged.items():
        if len(found) == 1 and found[0][1].shape == targets.shape(name) and _is_optional(converter):
            sources[name] = targets.plain(name, found[0][1])  # stored as it is used already
            continue
        for source in _merge(model, name, converter, found, targets, known):
            sources[source.name] = source
    return sources


class _Targets:
    """What the model wants: shapes and dtypes by name."""

    def __init__(self, model: nn.Module, wanted: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
        self._wanted, self._dtype = wanted, dtype
        plan: dict[str, torch.dtype] = model._get_dtype_plan(dtype)  # type: ignore[operator]
        self._plan = [(re.compile(pattern.replace("*", ".*")), kept) for pattern, kept in plan.items()]
        self._buffers = {name for name, _ in model.named_buffers()}

    def dtype(self, name: str) -> torch.dtype:
        for pattern, kept in self._plan:
            if pattern.search(name):
                return kept
        like = self._wanted[name]
        return like.dtype if name in self._buffers or not like.is_floating_point() else self._dtype

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._wanted[name].shape)

    def has(self, name: str) -> bool:
        return name in self._wanted

    def plain(self, name: str, entry: Entry) -> Source:
        if entry.shape != self.shape(name):
            raise CheckpointError(
                f"{entry.path}: {entry.name} has shape {list(entry.shape)}, but the model described by config.json has "
                f"{list(self.shape(name))} there ({name}); the configuration and the weights do not belong together"
            )
        return self.of(name, (Piece(entry.extent, stored_dtype(entry), 0, prod(entry.shape)),))

    def of(self, name: str, pieces: tuple[Piece, ...]) -> Source:
        return Source(name, self.dtype(name), self.shape(name), pieces)


def stored_dtype(entry: Entry) -> torch.dtype:
    """The torch dtype of a stored tensor."""
    if entry.dtype not in DTYPES:
        raise CheckpointError(f"{entry.path}: {entry.name} is stored as {entry.dtype}, which cannot be computed with")
    return DTYPES[entry.dtype]


_Run = tuple[int, int, int, int]  # which stored tensor, its first row, first row of the model's tensor, rows
_Known = dict[tuple[object, ...], dict[str, tuple[_Run, ...]]]
"""Conversions that were run already: what they did to tensors of the same shapes under another layer's names."""


def _merge(
    model: nn.Module,
    name: str,
    converter: Any,
    found: list[tuple[str, Entry]],
    targets: _Targets,
    known: _Known,
) -> list[Source]:
    """The tensors that a conversion makes of several stored ones."""
    shapes = tuple((pattern, _LAYER.sub("*", entry.name, count=1), entry.shape) for pattern, entry in found)
    key = (id(converter), shapes, _LAYER.sub("*", name, count=1), targets.has(name) and targets.shape(name))
    entries = [entry for _, entry in found]
    made = known.get(key)
    if made is None:
        runs = _runs_after(model, name, converter, found, targets)
        number = _LAYER.search(name)
        if number is None or any(_LAYER.search(target) is None for target in runs):
            made = runs
        else:
            made = known[key] = {_LAYER.sub("*", target, count=1): rows for target, rows in runs.items()}
    number = _LAYER.search(name)
    sources = []
    for pattern, rows in made.items():
        target = pattern.replace("*", number[0], 1) if number is not None else pattern
        shape = targets.shape(target)
        sources.append(targets.of(target, _pieces(rows, entries, shape[-1] if entries[0].shape[1:] else 1)))
    return sources


_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")  # the first number in a name


def _runs_after(
    model: nn.Module, name: str, converter: Any, found: list[tuple[str, Entry]], targets: _Targets
) -> dict[str, tuple[_Run, ...]]:
    """Target name -> runs of stored rows that it is made of.

    Raises:
        ModelError: what the conversion does is no permutation of rows.
    """
    first = _rows_after(model, name, converter, found, 1)
    second = _rows_after(model, name, converter, found, 3)  # arithmetic on values would not commute with this
    runs = {}
    for target, rows in first.items():
        if not targets.has(target):
            continue
        shape = targets.shape(target)
        width = shape[-1] if found[0][1].shape[1:] else 1
        ids = rows.reshape(-1)
        is_rows = bool(found[0][1].shape[1:])
        fits = tuple(rows.shape) == ((*shape[:-1], 1) if is_rows else shape)
        fits = fits and not (is_rows and any(e.shape[-1] != width for _, e in found))
        if not fits or not ids.numel() or not torch.equal(second[target].reshape(-1), ids * 3):
            raise _unsupported(name, converter)
        runs[target] = _runs(ids)
    return runs


def _is_optional(converter: Any) -> bool:
    """Whether a conversion leaves alone what has the model's shape already."""
    return all(getattr(op, "check_dims", False) for op in converter.operations)


def _rows_after(
    model: nn.Module, name: str, converter: Any, found: list[tuple[str, Entry]], scale: int
) -> dict[str, torch.Tensor]:
    """Runs the conversion on row numbers, multiplied by `scale`."""
    run = deepcopy(converter)
    if any(not entry.shape for _, entry in found):
        raise _unsupported(name, converter)
    for k, (pattern, entry) in enumerate(found):
        rows = torch.arange(prod(entry.shape[:-1]) if entry.shape[1:] else entry.shape[0], dtype=torch.int64)
        rows = ((rows + k * _STRIDE) * scale).reshape((*entry.shape[:-1], 1) if entry.shape[1:] else entry.shape)
        run.add_tensor(name, entry.name, pattern, rows)
    try:
        out = run.convert(name, model=model, config=getattr(model, "config", None))
    except Exception as error:  # an operation that needs whole rows or real values; any kind of error
        raise _unsupported(name, converter) from error
    return {n: v[0] if isinstance(v, list) else v for n, v in out.items()}


def _runs(ids: torch.Tensor) -> tuple[_Run, ...]:
    """Runs of consecutive stored rows."""
    breaks = (ids[1:] != ids[:-1] + 1).nonzero().reshape(-1) + 1
    starts = [0, *breaks.tolist(), len(ids)]
    return tuple((*divmod(int(ids[begin]), _STRIDE), begin, end - begin) for begin, end in pairwise(starts))


def _pieces(runs: tuple[_Run, ...], found: list[Entry], width: int) -> tuple[Piece, ...]:
    """Where those rows, of so many elements each, lie."""
    pieces = []
    for k, row, begin, count in runs:
        entry = found[k]
        dtype = stored_dtype(entry)
        row_nbytes = width * dtype.itemsize
        extent = Extent(entry.path, entry.offset + row * row_nbytes, count * row_nbytes)
        pieces.append(Piece(extent, dtype, begin * width, count * width))
    return tuple(pieces)


def _unsupported(name: str, converter: Any) -> ModelError:
    steps = ", ".join(type(op).__name__ for op in converter.operations)
    return ModelError(
        f"{name} is stored in another layout than the model uses it ({steps}), and its rows cannot be read one by one. "
        "Load the model with transformers and use offload.wrap(model), which writes it as it is used"
    )
