"""Files of training data, read by the record: an index of where each one begins, never their contents in memory."""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import msgspec

from offload.errors import DataError, UsageError
from offload.finetune.config import Data
from offload.finetune.records import Conversation, Record, Text, detect, parse
from offload.messages import Unusable

JSON_LINES = frozenset({".jsonl", ".ndjson", ".json"})
REFUSED = {".csv", ".tsv", ".parquet", ".arrow", ".xlsx", ".gz", ".zst", ".zip", ".bz2", ".xz"}
PIECE = 1 << 14  # bytes: plain text is cut at the end of the line that reaches this
BOM = b"\xef\xbb\xbf"
NAMED = 20  # bad lines that are kept by name; the others are counted

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Indexed:
    """One file.

    Attributes:
        path: where it is.
        format: of its records; plain for a file that is not JSON lines.
        starts: first byte of each usable record.
        lines: its line number, from 1.
        digest: of the file's bytes.
        has_conversations: some record needs a chat template.
    """

    path: Path
    format: str
    has_conversations: bool = False
    starts: array[int]
    lines: array[int]
    digest: str


class Records(Sequence[Record]):
    """The usable records of all files, in their order, read from disk when they are asked for.

    Attributes:
        files: their indexes.
        bad: what is wrong with lines that were left out, as "file:line: why", the first of them.
        bad_count: how many there are.
    """

    def __init__(self, files: Sequence[Indexed], bad: Sequence[str] = (), bad_count: int = 0) -> None:
        self.files, self.bad, self.bad_count = tuple(files), tuple(bad), bad_count
        self._ends = list(accumulate(len(file.starts) for file in files))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Record:  # type: ignore[override]
        """Raises DataError when the file has changed since it was indexed."""
        file, at = self._find(index)
        with file.path.open("rb") as handle:
            handle.seek(file.starts[at])
            if file.format == "plain":
                return _piece(handle.read(file.starts[at + 1] - file.starts[at]) if at + 1 < len(file.starts)
                              else handle.read(), is_end=at + 1 == len(file.starts))  # fmt: skip
            line = handle.readline()
        try:
            return parse(msgspec.json.decode(line), file.format)
        except (msgspec.DecodeError, UnicodeDecodeError, Unusable) as error:
            raise DataError(f"{error}: the file has changed since the run began", *self.place(index)) from None

    def place(self, index: int) -> tuple[str, int]:
        """File and line of a record."""
        file, at = self._find(index)
        return str(file.path), file.lines[at]

    @property
    def digest(self) -> str:
        """Of all files: the same data in the same order has the same."""
        return hashlib.blake2b("".join(f.digest + f.format for f in self.files).encode(), digest_size=16).hexdigest()

    def _find(self, index: int) -> tuple[Indexed, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        which = bisect_right(self._ends, index)
        return self.files[which], index - (self._ends[which - 1] if which else 0)


@dataclass(frozen=True, slots=True)
class DataFiles:
    """Training records, and held-out ones where there are any."""

    records: Records
    held_out: Records | None


def index_data(data: Data, *, progress: Progress | None = None) -> DataFiles:
    """The files of a configuration; see `index`."""
    skips = data.on_bad_line == "skip"
    records, held_out = (
        index(paths, format=data.format, skip_bad=skips, progress=progress) if paths else None
        for paths in (data.train, data.eval)
    )
    assert records is not None, "a configuration names training data"
    return DataFiles(records, held_out)


def index(
    paths: str | Sequence[str],
    *,
    format: str = "auto",
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> Records:
    """Reads the files once and checks every line.

    Args:
        paths: a file or several.
        format: of JSON lines; auto takes what the first usable line of each file has.
        skip_bad: leave unusable lines out instead of raising.
        progress: called with (what, bytes done, bytes in all).

    Raises:
        DataError: a line cannot be used; carries file and line.
        UsageError: a file is missing or is of no kind that is understood, or nothing usable is left.
    """
    names = [Path(p) for p in ([paths] if isinstance(paths, str) else paths)]
    if not names:
        raise UsageError("no file of training data was named")
    total, done = sum(_size(name) for name in names), 0
    files, bad, count = [], [], 0
    for name in names:

        def on_bad(line: int, why: str, name: Path = name) -> None:
            nonlocal count
            error = DataError(why, str(name), line)
            if not skip_bad:
                raise error
            count += 1
            if len(bad) < NAMED:
                bad.append(str(error))

        def on_bytes(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            if progress is not None:
                progress("indexing data", done, total)

        is_json = name.suffix.lower() in JSON_LINES
        files.append(_index_json(name, format, on_bad, on_bytes) if is_json else _index_plain(name, on_bytes))
    found = Records(files, bad, count)
    if not len(found):
        raise UsageError(f"{', '.join(map(str, names))}: no usable record ({count} lines cannot be used)")
    return found


def _size(path: Path) -> int:
    if path.suffix.lower() in REFUSED:
        raise UsageError(f"{path}: {path.suffix} files are not read; convert it to JSON lines, one object a line")
    if not path.is_file():
        raise UsageError(f"there is no file {path} of training data" + (": it is a folder" if path.is_dir() else ""))
    return path.stat().st_size


def _index_json(
    path: Path, format: str, on_bad: Callable[[int, str], None], on_bytes: Callable[[int], None]
) -> Indexed:
    starts, lines = array("Q"), array("Q")
    kind, talks = None if format == "auto" else format, False
    for number, start, line in _lines(path, hasher := hashlib.blake2b(digest_size=16), on_bytes):
        if not line.strip():
            continue
        try:
            record = msgspec.json.decode(line)
            if number == 1 and isinstance(record, list) and record and isinstance(record[0], dict):
                raise UsageError(f"{path} is one JSON array; write one object a line instead")
            if kind is None and isinstance(record, dict):
                kind = detect(record)
            talks |= isinstance(parse(record, kind or "text"), Conversation)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            if number == 1 and line.strip() in (b"[", b"[{"):
                raise UsageError(f"{path} is one JSON array; write one object a line instead") from None
            on_bad(number, f"is not JSON: {error}")
        except Unusable as error:
            on_bad(number, str(error))
        else:
            starts.append(start)
            lines.append(number)
    return Indexed(
        path=path,
        format=kind or "text",
        has_conversations=talks,
        starts=starts,
        lines=lines,
        digest=hasher.hexdigest(),
    )


def _index_plain(path: Path, on_bytes: Callable[[int], None]) -> Indexed:
    starts, lines, fill = array("Q"), array("Q"), PIECE
    for number, start, line in _lines(path, hasher := hashlib.blake2b(digest_size=16), on_bytes):
        try:
            line.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"is not UTF-8 text: {error.reason}", str(path), number) from None
        if fill >= PIECE:
            starts.append(start)
            lines.append(number)
            fill = 0
        fill += len(line)
    return Indexed(path=path, format="plain", starts=starts, lines=lines, digest=hasher.hexdigest())


def _lines(path: Path, hasher: hashlib.blake2b, on_bytes: Callable[[int], None]) -> Iterator[tuple[int, int, bytes]]:
    """Number, first byte and bytes of every line."""
    start, told = 0, 0
    with path.open("rb") as handle:
        for number, line in enumerate(handle, 1):
            mark = len(BOM) if number == 1 and line.startswith(BOM) else 0
            yield number, start + mark, line[mark:]
            hasher.update(line)
            start += len(line)
            if start - told >= 1 << 24:
                on_bytes(start - told)
                told = start
    on_bytes(start - told)


def _piece(data: bytes, *, is_end: bool) -> Text:
    return Text(data.decode(), is_end)
