"""Records from files: formats and their detection, bad lines by file and line, reading any record again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from offload.errors import DataError, UsageError
from offload.finetune.files import PIECE, index
from offload.finetune.records import FORMATS, Completion, Conversation, Text

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SHAPES: dict[str, tuple[Any, Any]] = {
    "messages": ({"messages": CHAT}, Conversation(CHAT)),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        Conversation(CHAT),
    ),
    "prompt_completion": ({"prompt": "2+2=", "completion": "4"}, Completion("2+2=", "4")),
    "alpaca": (
        {"instruction": "Add", "input": "2, 2", "output": "4"},
        Conversation([{"role": "user", "content": "Add\n\n2, 2"}, {"role": "assistant", "content": "4"}]),
    ),
    "text": ({"text": "Once"}, Text("Once")),
}


def write(path: Path, *lines: Any) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def test_every_format_is_in_the_table() -> None:
    assert set(SHAPES) == set(FORMATS)


@pytest.mark.parametrize("name", sorted(SHAPES))
@pytest.mark.parametrize("asked", ["auto", "named"])
def test_formats(tmp_path: Path, name: str, asked: str) -> None:
    written, expected = SHAPES[name]
    path = write(tmp_path / "x.jsonl", written, "", written)  # blank lines are nothing
    records = index(path, format="auto" if asked == "auto" else name)
    assert list(records) == [expected, expected]
    assert records.files[0].format == name
    assert records.place(1) == (path, 3)


def test_prompt_and_completion_as_messages(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", {"prompt": [*CHAT, CHAT[0]], "completion": [CHAT[1]]})
    assert index(path)[0] == Conversation([*CHAT, *CHAT], answer_from=3)


def test_alpaca_with_system_and_history(tmp_path: Path) -> None:
    record = {"instruction": "b", "output": "B", "system": "s", "history": [["a", "A"]]}
    found = index(write(tmp_path / "x.jsonl", record))[0]
    assert isinstance(found, Conversation)
    assert [m["content"] for m in found.messages] == ["s", "a", "A", "b", "B"]
    assert found.answer_from == 3


def test_several_files(tmp_path: Path) -> None:
    paths = [write(tmp_path / "a.jsonl", {"text": "a"}), write(tmp_path / "b.jsonl", SHAPES["alpaca"][0], {"text": 1})]
    with pytest.raises(DataError):
        index(paths)
    records = index(paths, skip_bad=True)
    assert len(records) == 2
    assert records[0] == Text("a")
    assert records.place(1) == (paths[1], 1)
    assert records.bad_count == 1
    assert records.digest != index(paths[:1]).digest


BAD = [
    ('{"messages": [', "is not JSON"),
    ("[1]", "is not an object"),
    ('{"other": 1}', "lacks 'messages'"),
    ('{"messages": []}', "not a list of messages"),
    ('{"messages": [{"content": "x"}]}', "has no role"),
    ('{"messages": [{"role": "user"}]}', "has no content"),
    ('{"messages": [{"role": "user", "content": "x"}]}', "the assistant says nothing"),
    ('{"messages": "\xff"}', "is not JSON|not a list"),
]


@pytest.mark.parametrize(("line", "says"), BAD)
def test_a_bad_line_is_named(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "x.jsonl"
    good = json.dumps(SHAPES["messages"][0])
    path.write_bytes(f"{good}\n\n".encode() + line.encode("latin-1") + f"\n{good}\n".encode())
    with pytest.raises(DataError, match=says) as caught:
        index(str(path))
    assert (caught.value.path, caught.value.line) == (str(path), 3)
    assert str(caught.value).startswith(f"{path}:3: ")
    records = index(str(path), skip_bad=True)
    assert (len(records), records.bad_count) == (2, 1)
    assert records.bad[0].startswith(f"{path}:3: ")
    assert records.place(1) == (str(path), 4)


def test_a_first_line_that_is_bad_decides_no_format(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", "[1]", {"keys": 1}, {"text": "a"})
    assert list(index(path, skip_bad=True)) == [Text("a")]
    with pytest.raises(DataError, match=r":2: has the keys 'keys', and no format does \(messages: messages;"):
        index(write(tmp_path / "y.jsonl", "", {"keys": 1}))


def test_files_that_are_not_understood(tmp_path: Path) -> None:
    for path, says in (
        (tmp_path / "none.jsonl", "there is no file"),
        (tmp_path, "there is no file .*: it is a folder"),
        (tmp_path / "x.parquet", "convert it to JSON lines"),
    ):
        with pytest.raises(UsageError, match=says):
            index(str(path))
    (tmp_path / "array.json").write_text('[{"text": "a"}]')
    with pytest.raises(UsageError, match="one JSON array"):
        index(str(tmp_path / "array.json"))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UsageError, match="no usable record"):
        index(str(tmp_path / "empty.jsonl"))


def test_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}')
    assert list(index(str(path))) == [Text("a"), Text("b")]


def test_plain_text_is_cut_at_line_ends_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    text = "".join(f"line {k} ä\n" for k in range(5000)) + "the end"
    path.write_text(text)
    records = index(str(path))
    assert len(records) == 1 + len(text.encode()) // (PIECE + 20)
    pieces = list(records)
    assert "".join(p.text for p in pieces if isinstance(p, Text)) == text
    assert [p.is_end for p in pieces if isinstance(p, Text)] == [False] * (len(pieces) - 1) + [True]
    path.write_bytes(b"fine\n\xff\xfe\n")
    with pytest.raises(DataError, match=r"x.txt:2: is not UTF-8"):
        index(str(path))


def test_a_file_that_changes_meanwhile(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", {"text": "a"})
    records = index(path)
    (tmp_path / "x.jsonl").write_text("{}")
    with pytest.raises(DataError, match="has changed since the run began"):
        _ = records[0]
