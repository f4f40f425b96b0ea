"""Headers against the reference library: what is accepted is what it reads; the rest is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from io_safetensors import GOOD, SMALL, lay_out, one, pack, save, tensor

from offload.errors import CheckpointError, FormatError, StorageError
from offload.io.safetensors import ITEMSIZE_BITS, Entry, Limits, read_header


def reference(contents: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """What the reference library makes of a file, or None when it refuses."""
    try:
        found = safetensors.deserialize(contents)
    except safetensors.SafetensorError:
        return None
    return {name: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for name, t in found}


def ours(path: Path, contents: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    path.write_bytes(contents)
    try:
        header = read_header(path)
    except FormatError:
        return None
    at = header.data_offset
    for entry in header.entries:
        assert entry.offset == at
        at += entry.nbytes
    assert at == header.file_nbytes == len(contents), "every data byte belongs to one tensor"
    return {e.name: (e.dtype, e.shape, contents[e.offset : e.offset + e.nbytes]) for e in header.entries}


def test_right_files_equal_the_reference(tmp_path: Path) -> None:
    right = {
        "empty": pack({}),
        "padded": pack(b"{}      \n\t\r"),
        "spaced": pack(b'{ "t" : { "shape" : [ 4 ] ,\n"data_offsets":[ 0 , 4 ], "dtype" : "U8" } } ', b"1234"),
        "small": pack(*lay_out(SMALL)),
        "metadata last": pack({"t": tensor(), "__metadata__": {"format": "pt", "é": "“{}[],:\\\"”\n"}}, b"1234"),
        "metadata empty": pack({"__metadata__": {}, "t": tensor()}, b"1234"),
        "odd names": pack(
            {"": tensor(), "é☃😀": tensor(offsets=[4, 8]), 'a"\\/{}\n': tensor(offsets=[8, 12])}, b"123456789abc"
        ),
        "raw UTF-8": pack('{"é☃😀":'.encode() + GOOD.encode() + b"}", b"1234"),
        "out of order": pack({"b": tensor(offsets=[4, 8]), "a": tensor()}, b"12345678"),
        "zero sizes share a place": pack(
            {"z": tensor(shape=[0], offsets=[4, 4]), "a": tensor(), "y": tensor(shape=[2, 0], offsets=[4, 4])}, b"1234"
        ),
        "rank 64": pack({"t": tensor(shape=[1] * 63 + [4])}, b"1234"),
        "every dtype": pack(*lay_out({name: (name, (8, 3)) for name in ITEMSIZE_BITS})),
    }  # fmt: skip
    for name, contents in right.items():
        expected = reference(contents)
        assert expected is not None, name
        assert ours(tmp_path / "file", contents) == expected, name


def test_the_table_of_dtypes_is_the_reference_s(tmp_path: Path) -> None:
    with pytest.raises(safetensors.SafetensorError) as caught:
        safetensors.deserialize(one(tensor("?")))
    listed = str(caught.value).partition("expected one of ")[2].partition(" at line")[0]
    assert set(listed.replace("`", "").split(", ")) <= set(ITEMSIZE_BITS)


def test_entries(tmp_path: Path) -> None:
    path = save(tmp_path / "file", SMALL, {"format": "pt"})
    header = read_header(str(path))
    assert header.metadata == {"format": "pt"}
    assert header.path == str(path)
    begin = header.data_offset
    assert header.entries == (
        Entry("a", "F32", (2, 3), str(path), begin, 24),
        Entry("b.weight", "BF16", (4,), str(path), begin + 24, 8),
        Entry("empty", "I64", (0, 5), str(path), begin + 32, 0),
        Entry("scalar", "U8", (), str(path), begin + 32, 1),
    )
    assert header.entries[1].extent.end == begin + 32


def test_every_prefix_and_every_byte(tmp_path: Path) -> None:
    """All prefixes of a small file are refused; a changed byte is refused or gives what the reference gives."""
    contents = pack(*lay_out({"ab": ("F16", (2,)), "c": ("U8", (3,))}))
    path = tmp_path / "file"
    for nbytes in range(len(contents)):
        assert ours(path, contents[:nbytes]) is None, nbytes
    assert ours(path, contents + b"\0") is None
    for at in range(len(contents) - 7):
        for change in (1, 2, 0x20, 0x80):
            changed = bytearray(contents)
            changed[at] ^= change
            found = ours(path, bytes(changed))
            assert found is None or found == reference(bytes(changed)), (at, change)


JUNK: st.SearchStrategy[Any] = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 40), st.integers(2**31, 2**70), st.floats(), st.text(max_size=4),
    st.lists(st.integers(-1, 9), max_size=4), st.dictionaries(st.text(max_size=2), st.integers(0, 9), max_size=2),
    st.sampled_from(["U8", "F16", "F4", "BF16", "dtype", "shape", [0, 4], [4, 8], [0, 0], [2, 2]]),
)  # fmt: skip


@st.composite
def mutations(draw: st.DrawFn) -> bytes:
    """A right file of a few tensors, with up to three things changed: fields, names, frame or bytes."""
    dtypes = st.sampled_from(["U8", "F16", "F32", "F4"])
    shapes = st.lists(st.integers(0, 3).map(lambda n: 2 * n), max_size=3).map(tuple)
    header, data = lay_out(
        draw(st.dictionaries(st.text(max_size=3), st.tuples(dtypes, shapes).filter(_is_whole), max_size=4))
    )
    names = list(header)
    for _ in range(draw(st.integers(0, 3))):
        kind = draw(st.sampled_from(["field", "drop", "add", "metadata", "data"]))
        if kind == "field" and names:
            entry = header.get(draw(st.sampled_from(names)))
            if isinstance(entry, dict):
                entry[draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))] = draw(JUNK)
        elif kind == "drop" and names:
            header.pop(draw(st.sampled_from(names)), None)
        elif kind == "add":
            header[draw(st.text(max_size=3))] = draw(st.one_of(JUNK, st.just(tensor())))
        elif kind == "metadata":
            header["__metadata__"] = draw(st.one_of(JUNK, st.dictionaries(st.text(max_size=3), st.text(max_size=9))))
        elif kind == "data":
            data = data[: draw(st.integers(0, len(data)))] + draw(st.binary(max_size=4))
    contents = bytearray(pack(json.dumps(header, ensure_ascii=draw(st.booleans())).encode(errors="replace"), data))
    for _ in range(draw(st.integers(0, 2))):
        contents[draw(st.integers(0, len(contents) - 1))] = draw(st.integers(0, 255))
    return bytes(contents)


def _is_whole(described: tuple[str, tuple[int, ...]]) -> bool:
    dtype, shape = described
    count = 1
    for size in shape:
        count *= size
    return count * ITEMSIZE_BITS[dtype] % 8 == 0


@given(contents=mutations())
@settings(derandomize=True, max_examples=400, deadline=None, database=None)
def test_whatever_is_accepted_is_what_the_reference_reads(tmp_path_factory: Any, contents: bytes) -> None:
    found = ours(tmp_path_factory.getbasetemp() / "mutated", contents)
    if found is not None:
        assert found == reference(contents)


@given(contents=st.binary(max_size=80))
@settings(derandomize=True, max_examples=200, deadline=None, database=None)
def test_noise_is_refused_politely(tmp_path_factory: Any, contents: bytes) -> None:
    found = ours(tmp_path_factory.getbasetemp() / "noise", contents)
    assert found is None or found == reference(contents)


def test_not_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(FormatError, match="not a regular file"):
            read_header(path)
    assert issubclass(FormatError, CheckpointError)


def test_unreadable(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", str(tmp_path / "a\0b"), tmp_path / ("n" * 300)):
        with pytest.raises(StorageError, match="cannot read the header"):
            read_header(path)


def test_limits_can_be_raised_or_lowered(tmp_path: Path) -> None:
    path = save(tmp_path / "file", SMALL)
    for limits, message in (
        (Limits(header_nbytes=50), "at most 50 are read"),
        (Limits(tensors=3), "more than 3 tensors"),
        (Limits(name_nbytes=5), "at most 5"),
        (Limits(rank=1), "up to 1"),
        (Limits(dimensions=2), "more than 2 dimensions"),
    ):
        with pytest.raises(FormatError, match=message):
            read_header(path, limits=limits)
    assert len(read_header(path, limits=Limits(tensors=4, rank=2, dimensions=5, name_nbytes=8)).entries) == 4
