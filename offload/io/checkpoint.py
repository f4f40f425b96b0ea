"""A checkpoint in its directory: which files belong to it, and every tensor of theirs.

The index of a sharded checkpoint comes from the same stranger as the headers. A shard's name must be a plain file
name, and the file must lie in the directory itself; the one link that may leave it is that of a Hugging Face cache,
from snapshots/<revision>/ to blobs/.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from offload.errors import CheckpointError, FormatError, PickleError
from offload.io.entries import Entry
from offload.io.header import read_header

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth")
_INDEX_NBYTES = 48 << 20
_INDEX_TENSORS = 400_000


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Every tensor of a checkpoint by name, in the order of files and of bytes in them.

    Attributes:
        directory: where it lies.
        files: the safetensors files, links resolved.
        nbytes: of all tensors.
        params: elements of all tensors.
    """

    directory: str
    entries: dict[str, Entry]
    files: tuple[str, ...]
    nbytes: int
    params: int


def read_checkpoint(path: str | os.PathLike[str], *, is_whole: bool = True) -> Checkpoint:
    """Find a checkpoint's files and read their headers.

    Args:
        is_whole: False takes files that hold a header only, for plans; see `read_header`.
        path: a directory with model.safetensors, or with model.safetensors.index.json and shards, or with any other
            safetensors files; or one such file.

    Raises:
        CheckpointError: nothing there, a shard is missing, or index and shards disagree.
        FormatError: a file or the index breaks the format's rules, or a name leads out of the directory.
        PickleError: there are only files whose reading would run code.
        StorageError: a file cannot be read.
    """
    name = os.path.abspath(os.fspath(path))
    if not os.path.isdir(name):
        return _read_file(name, is_whole)
    found = sorted(os.listdir(name))
    if SINGLE in found:
        return _gather(name, [_resolve(name, SINGLE)], is_whole)
    if INDEX in found:
        return _read_sharded(name, os.path.join(name, INDEX), is_whole)
    shards = [file for file in found if file.endswith(".safetensors")]
    if shards:
        return _gather(name, [_resolve(name, file) for file in shards], is_whole)
    pickles = [file for file in found if file.endswith(_PICKLES)]
    if pickles:
        raise _pickle_error(name, pickles)
    lies = ", ".join(found[:12]) + (", …" if len(found) > 12 else "") if found else "nothing"
    raise CheckpointError(f"{name}: looked for {SINGLE}, {INDEX} and *.safetensors; there lies {lies}")


def indexed_shards(path: str | os.PathLike[str]) -> list[str]:
    """Names of the files that a directory's index speaks of, here or not; none where no index counts.

    Raises:
        CheckpointError, FormatError: the index cannot be used.
    """
    name = os.path.abspath(os.fspath(path))
    if os.path.exists(os.path.join(name, SINGLE)) or not os.path.exists(os.path.join(name, INDEX)):
        return []
    return sorted(set(_read_index(os.path.join(name, INDEX)).values()))


def _read_file(name: str, is_whole: bool) -> Checkpoint:
    directory = os.path.dirname(name)
    if not os.path.exists(name):
        raise CheckpointError(f"{name}: does not exist; a directory with safetensors files, or one such, was expected")
    if name.endswith(_PICKLES):
        raise _pickle_error(directory, [os.path.basename(name)])
    if name.endswith(".safetensors.index.json"):
        return _read_sharded(directory, name, is_whole)
    if name.endswith(".safetensors"):
        return _gather(directory, [os.path.realpath(name)], is_whole)  # the user named it: a link is theirs to follow
    raise CheckpointError(f"{name}: is neither a directory nor a .safetensors file")


def _pickle_error(directory: str, pickles: list[str]) -> PickleError:
    return PickleError(
        f"{directory}: holds only pickle files ({', '.join(pickles[:4])}{', …' if len(pickles) > 4 else ''}), and "
        "reading one runs whatever code is in it. If you trust where it comes from, convert it in a sandbox: "
        f'AutoModelForCausalLM.from_pretrained("{directory}").save_pretrained("converted"), which writes safetensors'
    )


def _read_sharded(directory: str, index: str, is_whole: bool) -> Checkpoint:
    weight_map = _read_index(index)
    shards = {shard: _resolve(directory, shard) for shard in sorted(set(weight_map.values()))}
    missing = [shard for shard, real in shards.items() if not os.path.exists(real)]
    if missing:
        raise CheckpointError(
            f"{directory}: {len(missing)} of {len(shards)} shards are missing: {', '.join(missing[:8])}; download the "
            "checkpoint again"
        )
    checkpoint = _gather(directory, shards.values(), is_whole)
    for tensor, shard in weight_map.items():
        entry = checkpoint.entries.get(tensor)
        if entry is None or entry.path != shards[shard]:
            where = "no shard" if entry is None else os.path.basename(entry.path)
            raise CheckpointError(f"{index}: says that tensor {tensor[:120]!r} is in {shard}; it is in {where}")
    return checkpoint


def _gather(directory: str, files: Iterable[str], is_whole: bool) -> Checkpoint:
    entries: dict[str, Entry] = {}
    paths = tuple(dict.fromkeys(files))
    params = 0
    for path in paths:
        for entry in read_header(path, is_whole=is_whole).entries:
            if entry.name in entries:
                raise CheckpointError(
                    f"{directory}: tensor {entry.name[:120]!r} is in {os.path.basename(entries[entry.name].path)} and "
                    f"in {os.path.basename(path)}"
                )
            entries[entry.name] = entry
            count = 1
            for size in entry.shape:
                count *= size
            params += count
    return Checkpoint(directory, entries, paths, sum(entry.nbytes for entry in entries.values()), params)


def _resolve(directory: str, name: str) -> str:
    """The real path of a file in a directory. Raises FormatError when it lies elsewhere."""
    root = os.path.realpath(directory)
    real = os.path.realpath(os.path.join(root, name))
    home = os.path.dirname(real)
    if home == root:
        return real
    above = os.path.dirname(root)
    is_hub = os.path.basename(above) == "snapshots" and home == os.path.join(os.path.dirname(above), "blobs")
    if not is_hub:
        raise FormatError(
            f"{os.path.join(directory, name)}: is a link to {real}, outside of the checkpoint's directory; copy the "
            "file there, or name the directory that holds it"
        )
    return real


def _read_index(path: str) -> dict[str, str]:
    """The checked weight_map: tensor -> plain file name. Raises FormatError."""
    try:
        with open(_resolve(os.path.dirname(path), os.path.basename(path)), "rb") as file:
            raw = file.read(_INDEX_NBYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    # Counted before parsing, so that it cannot cost much more than its size: two strings and a comma for each tensor.
    if len(raw) > _INDEX_NBYTES or raw.count(b'"') > 4 * _INDEX_TENSORS or raw.count(b",") > _INDEX_TENSORS:
        raise FormatError(f"{path}: is larger than an index of {_INDEX_TENSORS:,} tensors")
    if raw.count(b"{") + raw.count(b"[") > 1000:
        raise FormatError(f"{path}: holds more brackets than an index needs")
    try:
        index = json.loads(raw.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: is not valid JSON in UTF-8: {error}") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{path}: has no weight_map; expected an object of tensor -> file name")
    for tensor, shard in weight_map.items():
        if (problem := _name_problem(shard)) is not None:
            raise FormatError(f"{path}: tensor {tensor[:120]!r} is said to be in {repr(shard)[:120]}, which {problem}")
    return weight_map


def _name_problem(shard: object) -> str | None:
    """Why a value of weight_map is not a plain file name, or None when it is one."""
    if type(shard) is not str:
        return "is not text"
    if not shard.endswith(".safetensors"):
        return "does not end with .safetensors"
    if any(part in shard for part in ("/", "\\", "..", ":")) or not shard.isprintable() or shard.startswith("."):
        return "is not a plain file name"
    if len(shard.encode(errors="replace")) > 255:
        return "is too long for a file name"
    return None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found
