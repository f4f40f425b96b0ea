"""The header of one safetensors file, read as if an attacker had written it. Tensor data are not touched.

The format: 8 bytes N, little-endian; N bytes of JSON, an object of name -> {"dtype", "shape", "data_offsets"} and
perhaps "__metadata__"; then the tensors' bytes, without holes.

What a header can cost is bounded before it is paid. No parser ever sees more of it than one tensor's flat object or
one metadata string, so neither nesting nor millions of keys build up objects, and every number is checked as soon as
it is read. The limits hold the memory under 64 MiB above what the process had.
"""

from __future__ import annotations

import codecs
import itertools
import json
import os
import re
import sys
from array import array
from typing import Any, NoReturn

from offload.errors import FormatError, StorageError
from offload.io.entries import FORMAT_HEADER_NBYTES, ITEMSIZE_BITS, LIMITS, Entry, Header, Limits
from offload.io.metadata import read_strings
from offload.io.osfiles import OsFiles


def read_header(path: str | os.PathLike[str], *, limits: Limits = LIMITS, is_whole: bool = True) -> Header:
    """Read and check a file's header.

    Args:
        is_whole: the file must hold the tensors that its header describes, no more and no less. False takes a header
            alone, for plans of checkpoints that are not here; such a file must not be read from.

    Raises:
        FormatError: a rule is broken, or a limit passed; names file, tensor, what was found and what was expected.
        StorageError: the file is missing or cannot be read.
    """
    name = os.fspath(path)
    files = OsFiles()
    try:
        fd = files.open(name, is_writable=False)
        try:
            status = files.status(fd)
            if not status.is_regular:
                raise FormatError(f"{name}: not a regular file; a safetensors file was expected")
            raw = _read_json(fd, name, status.nbytes, limits)
        finally:
            files.close(fd)
    except (OSError, ValueError) as error:
        number = error.errno if isinstance(error, OSError) else None  # ValueError: a NUL in the path
        reason = os.strerror(number) if number else str(error)
        raise StorageError(f"cannot read the header: {reason}", path=name, errno=number) from error
    return _Parser(name, raw, status.nbytes if is_whole else None, limits).parse()


def _read_json(fd: int, path: str, file_nbytes: int, limits: Limits) -> bytes:
    if file_nbytes < 10:
        raise FormatError(f"{path}: holds {file_nbytes} bytes; the smallest safetensors file has 10")
    nbytes = int.from_bytes(_pread(fd, 8, 0), "little")
    if nbytes > min(FORMAT_HEADER_NBYTES, file_nbytes - 8) or nbytes < 2:
        raise FormatError(
            f"{path}: the header claims {nbytes:,} bytes; expected 2 to "
            f"{min(FORMAT_HEADER_NBYTES, file_nbytes - 8):,} in a file of {file_nbytes:,} bytes"
        )
    if nbytes > limits.header_nbytes:
        raise FormatError(
            f"{path}: the header has {nbytes:,} bytes; at most {limits.header_nbytes:,} are read (over 100,000 "
            "tensors): split the checkpoint into shards, or pass larger limits if you trust the file"
        )
    if (first := _pread(fd, 1, 8)) != b"{":
        raise FormatError(f"{path}: the header begins with {first!r}, expected b'{{'")
    raw = _pread(fd, nbytes, 8)
    if len(raw) != nbytes:
        raise FormatError(f"{path}: the file ended after {len(raw):,} of {nbytes:,} header bytes")
    return raw


def _pread(fd: int, nbytes: int, offset: int) -> bytes:
    found = os.pread(fd, nbytes, offset)
    while 0 < len(found) < nbytes and (more := os.pread(fd, nbytes - len(found), offset + len(found))):
        found += more
    return found


_UNKNOWN = 1 << 60  # more bytes than any file has
_SPACE = rb"[ \t\n\r]*"
# A name in quotes and the colon after it. The counts bound the work; the exact limit on names is checked after it.
_KEY = re.compile(
    _SPACE + rb'("[^"\\\x00-\x1f]{0,6144}(?:\\.[^"\\\x00-\x1f]{0,6144}){0,1024}")' + _SPACE + b":" + _SPACE
)
_TENSOR = re.compile(rb"\{[^{}]{0,4096}\}")  # flat, and room for 64 dimensions of 20 digits
_SEPARATOR = re.compile(_SPACE + rb"([,}])")
_END = re.compile(_SPACE + rb"\}" + _SPACE + rb"\Z")
_TRAILER = re.compile(_SPACE + rb"\Z")
_FIELDS = {"dtype", "shape", "data_offsets"}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text[:32]} is not a whole number")


_JSON = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_refuse, parse_constant=_refuse)


class _Parser:
    """One pass over a header's bytes."""

    def __init__(self, path: str, raw: bytes, file_nbytes: int | None, limits: Limits) -> None:
        self.path, self.raw, self.limits = path, raw, limits
        self.data_offset = 8 + len(raw)
        self.is_whole = file_nbytes is not None
        self.data_nbytes = file_nbytes - self.data_offset if file_nbytes is not None else _UNKNOWN
        self.metadata: dict[str, str] | None = None
        # What is read so far, as columns: a tenth of the memory of entries, which are made when all is known right.
        self.names: dict[str, None] = {}
        self.dtypes: list[str] = []
        self.ranks, self.sizes = array("L"), array("Q")  # the sizes of all dimensions, one shape after the other
        self.begins, self.ends = array("Q"), array("Q")
        self.total_nbytes = 0

    def parse(self) -> Header:
        at = 1
        if not _END.match(self.raw, at):
            is_last = False
            while not is_last:
                at, is_last = self._pair(at)
            if not _TRAILER.match(self.raw, at):
                self._fail(f"byte {at:,} of the header follows its end; only white space may")
        entries = self._in_order()
        nbytes = self.data_offset + (self.data_nbytes if self.is_whole else self.total_nbytes)
        return Header(self.path, entries, self.metadata or {}, self.data_offset, nbytes)

    def _pair(self, at: int) -> tuple[int, bool]:
        """Read one key and its value; returns where the next begins and whether there is none."""
        key = _KEY.match(self.raw, at)
        if key is None:
            self._fail(f"byte {at:,} of the header begins no name with a value: {self.raw[at : at + 24]!r}")
        name = self._string(key[1])
        at = self._read_metadata(key.end()) if name == "__metadata__" else self._read_tensor(name, key.end())
        separator = _SEPARATOR.match(self.raw, at)
        if separator is None:
            self._fail(f"byte {at:,} of the header: expected ',' or '}}', found {self.raw[at : at + 8]!r}")
        return separator.end(), separator[1] == b"}"

    def _string(self, quoted: bytes) -> str:
        try:
            text: str = json.loads(quoted.decode()) if b"\\" in quoted else quoted[1:-1].decode()
            nbytes = len(text.encode())  # fails for half a surrogate pair
        except ValueError as error:
            self._fail(f"a name is not valid JSON in UTF-8: {quoted[:40]!r} ({error})")
        if nbytes > self.limits.name_nbytes:
            self._fail(f"a name has {nbytes:,} bytes, at most {self.limits.name_nbytes:,} are allowed: {text[:40]!r}…")
        return text

    def _read_tensor(self, name: str, at: int) -> int:
        value = _TENSOR.match(self.raw, at)
        if value is None:
            self._fail_tensor(name, f"expected a flat object of at most 4096 bytes, found {self.raw[at : at + 24]!r}")
        if name in self.names:
            self._fail_tensor(name, "the name occurs twice")
        if len(self.names) >= self.limits.tensors:
            self._fail(f"more than {self.limits.tensors:,} tensors; split the checkpoint, or pass larger limits")
        flat = value[0]
        try:
            if b"-" in flat:  # in no dtype and no number that is allowed; also -0, which Python would read as 0
                raise ValueError("there is a '-' in it")
            text = flat.decode()
            fields, end = _JSON.raw_decode(text)
            if end != len(text):
                raise ValueError(f"{text[end : end + 16]!r} follows it")
        except (ValueError, RecursionError) as error:
            self._fail_tensor(name, f"its entry is not valid: {error}")
        self._check_tensor(name, fields)
        self.names[name] = None
        return value.end()

    def _check_tensor(self, name: str, fields: dict[str, Any]) -> None:
        if fields.keys() != _FIELDS:
            self._fail_tensor(name, f"found the fields {_short(sorted(fields))}, expected {sorted(_FIELDS)}")
        dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
        bits = ITEMSIZE_BITS.get(dtype) if type(dtype) is str else None
        if bits is None:
            self._fail_tensor(name, f"dtype {_short(dtype)} is not known; known are {', '.join(ITEMSIZE_BITS)}")
        if type(shape) is not list or len(shape) > self.limits.rank or not _are_whole(shape):
            self._fail_tensor(name, f"shape {_short(shape)}: expected up to {self.limits.rank} whole numbers")
        if type(offsets) is not list or len(offsets) != 2 or not _are_whole(offsets):
            self._fail_tensor(name, f"data_offsets {_short(offsets)}: expected two whole numbers")
        begin, end = offsets
        if not begin <= end <= self.data_nbytes:
            self._fail_tensor(
                name,
                f"data_offsets {_short(offsets)} leave the {self.data_nbytes:,} data bytes: a file cut short? Fetch it "
                "again",
            )
        count = bits
        for size in shape:
            count *= size
            if count >= 1 << 64 or size >= 1 << 63:
                self._fail_tensor(name, f"shape {_short(shape)} overflows 64 bits")
        if count % 8 or count // 8 != end - begin:
            self._fail_tensor(
                name,
                f"{dtype} {_short(shape)} takes {count / 8:,.10g} bytes, its data_offsets [{begin:,}, {end:,}] hold "
                f"{end - begin:,}",
            )
        self.total_nbytes += end - begin
        if self.total_nbytes > self.data_nbytes:
            self._fail_tensor(name, f"tensors overlap: up to here they take more than {self.data_nbytes:,} data bytes")
        if len(self.sizes) + len(shape) > self.limits.dimensions:
            self._fail_tensor(name, f"the shapes have more than {self.limits.dimensions:,} dimensions together")
        self.dtypes.append(sys.intern(dtype))
        self.ranks.append(len(shape))
        self.sizes.extend(shape)
        self.begins.append(begin)
        self.ends.append(end)

    def _in_order(self) -> tuple[Entry, ...]:
        """Check that the tensors cover the data without hole or overlap, and make their entries."""
        begins, ends = self.begins, self.ends
        # By offset, and of those at one offset the empty ones first; one number a key, as a tuple would take far more.
        order = sorted(range(len(begins)), key=lambda i: 2 * begins[i] + (ends[i] > begins[i]))
        at = 0
        for i in order:
            if begins[i] != at:
                name = next(itertools.islice(self.names, i, None))
                kind = "a hole" if begins[i] > at else "an overlap"
                self._fail_tensor(name, f"{kind}: it begins at data byte {begins[i]:,}, expected {at:,}")
            at = ends[i]
        if self.is_whole and at != self.data_nbytes:
            self._fail(f"{self.data_nbytes - at:,} bytes follow the last tensor; the file must end with it")
        firsts = array("Q", itertools.accumulate(self.ranks, initial=0))
        names = list(self.names)
        return tuple(
            Entry(
                names[i], self.dtypes[i], tuple(self.sizes[firsts[i] : firsts[i + 1]]), self.path,
                self.data_offset + begins[i], ends[i] - begins[i],
            )
            for i in order
        )  # fmt: skip

    def _read_metadata(self, at: int) -> int:
        if self.metadata is not None:
            self._fail("__metadata__ occurs twice")
        if self.raw[at : at + 1] != b"{":
            self._fail(f"__metadata__ begins with {self.raw[at : at + 8]!r}; expected an object of strings")
        try:
            # The window may cut the header anywhere, so a character that is cut at its end is left out.
            text, _ = codecs.utf_8_decode(self.raw[at : at + self.limits.metadata_nbytes], "strict", False)
            self.metadata, end = read_strings(text, self.limits.metadata_pairs)
        except (ValueError, IndexError) as error:
            self._fail(
                f"__metadata__ must be an object of strings, in UTF-8, of at most {self.limits.metadata_nbytes:,} "
                f"bytes and {self.limits.metadata_pairs:,} different keys: {error}"
            )
        return at + len(text[:end].encode())

    def _fail_tensor(self, name: str, message: str) -> NoReturn:
        raise FormatError(f"{self.path}: tensor {name[:120]!r}: {message}")

    def _fail(self, message: str) -> NoReturn:
        raise FormatError(f"{self.path}: {message}")


def _are_whole(values: list[Any]) -> bool:
    return set(map(type, values)) <= {int}  # a bool is not one


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "…"
