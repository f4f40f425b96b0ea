"""Checkpoints: which files belong to one, and names that would lead elsewhere."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from io_safetensors import SMALL, lay_out, pack, save

from offload.errors import CheckpointError, FormatError, PickleError
from offload.io.safetensors import read_checkpoint, read_header

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
ONE, TWO = {"a": ("F32", (2, 3))}, {"b": ("BF16", (4,)), "c": ("U8", ())}


def write_index(directory: Path, weight_map: object, **more: object) -> None:
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 33}, "weight_map": weight_map, **more}))


def sharded(directory: Path) -> Path:
    save(directory / FIRST, ONE)
    save(directory / SECOND, TWO)
    write_index(directory, {"a": FIRST, "b": SECOND, "c": SECOND})
    return directory


def test_one_file(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", SMALL)
    for path in (tmp_path, str(tmp_path), tmp_path / "model.safetensors"):
        found = read_checkpoint(path)
        assert found.directory == str(tmp_path)
        assert found.files == (str(tmp_path / "model.safetensors"),)
        assert list(found.entries) == ["a", "b.weight", "empty", "scalar"]
        assert (found.nbytes, found.params) == (33, 6 + 4 + 0 + 1)
        assert found.entries["b.weight"] == read_header(tmp_path / "model.safetensors").entries[1]


def test_shards(tmp_path: Path) -> None:
    sharded(tmp_path)
    for path in (tmp_path, tmp_path / INDEX):
        found = read_checkpoint(path)
        assert [(name, os.path.basename(entry.path)) for name, entry in found.entries.items()] == [
            ("a", FIRST), ("b", SECOND), ("c", SECOND),
        ]  # fmt: skip
        assert [os.path.basename(file) for file in found.files] == [FIRST, SECOND]
        assert (found.nbytes, found.params) == (33, 11)


def test_a_single_file_comes_before_an_index_and_strangers(tmp_path: Path) -> None:
    sharded(tmp_path)
    save(tmp_path / "model.safetensors", SMALL)
    assert read_checkpoint(tmp_path).files == (str(tmp_path / "model.safetensors"),)


def test_files_of_other_names(tmp_path: Path) -> None:
    save(tmp_path / "consolidated-1.safetensors", ONE)
    save(tmp_path / "consolidated-2.safetensors", TWO)
    (tmp_path / "pytorch_model.bin").write_bytes(b"ignored")
    assert sorted(read_checkpoint(tmp_path).entries) == ["a", "b", "c"]
    save(tmp_path / "more.safetensors", ONE)
    with pytest.raises(CheckpointError, match=r"'a' is in consolidated-1\.safetensors and in more\.safetensors"):
        read_checkpoint(tmp_path)


def test_missing_shards_are_named(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / SECOND).unlink()
    with pytest.raises(CheckpointError, match=f"1 of 2 shards are missing: {SECOND}"):
        read_checkpoint(tmp_path)


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    sharded(tmp_path)
    for weight_map, message in (
        ({"a": FIRST, "b": FIRST, "c": SECOND}, f"'b' is in {FIRST}; it is in {SECOND}"),
        ({"a": FIRST, "b": SECOND, "c": SECOND, "d": SECOND}, f"'d' is in {SECOND}; it is in no shard"),
        ({"b": SECOND, "c": FIRST}, "'c' is in"),
    ):
        write_index(tmp_path, weight_map)
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(tmp_path)
    write_index(tmp_path, {"a": FIRST, "b": SECOND})  # a tensor that the index forgot belongs to its shard
    assert "c" in read_checkpoint(tmp_path).entries


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    sharded(tmp_path)
    save(tmp_path / SECOND, {**TWO, "a": ("U8", (1,))})
    with pytest.raises(CheckpointError, match=f"'a' is in {FIRST} and in {SECOND}"):
        read_checkpoint(tmp_path)


def test_a_broken_shard_is_named(tmp_path: Path) -> None:
    sharded(tmp_path)
    contents = (tmp_path / SECOND).read_bytes()
    for broken in (b"", contents[:-1], contents + b"\0", contents[:20]):
        (tmp_path / SECOND).write_bytes(broken)
        with pytest.raises(FormatError, match=SECOND):
            read_checkpoint(tmp_path)


BAD_NAMES = [
    "../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "./x.safetensors", "..\\x.safetensors",
    "C:\\x.safetensors", "C:x.safetensors", "\\\\host\\x.safetensors", "x.safetensors\0", "a\0b.safetensors",
    "..safetensors", ".safetensors", ".hidden.safetensors", "x..safetensors", "x.bin", "x.safetensors.bin", "",
    "x.safetensors/", "x.SAFETENSORS", "~/x.safetensors", "x\n.safetensors", "x\u202e.safetensors",
    "\ud800.safetensors", "n" * 300 + ".safetensors", "é" * 130 + ".safetensors", None, 1, True, ["x.safetensors"],
    {"x.safetensors": 1}, "file:///x.safetensors", "http://host/x.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES, ids=lambda name: ascii(name)[:40])
def test_names_that_are_not_plain_are_refused_before_any_file_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: object
) -> None:
    sharded(tmp_path)
    write_index(tmp_path, {"a": FIRST, "b": name})
    monkeypatch.setattr("offload.io.checkpoint.read_header", lambda path: pytest.fail(f"opened {path}"))
    with pytest.raises(FormatError, match=INDEX):
        read_checkpoint(tmp_path)


def test_links_out_of_the_directory_are_refused(tmp_path: Path) -> None:
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    outside.mkdir()
    inside.mkdir()
    save(outside / "x.safetensors", TWO)
    save(inside / FIRST, ONE)
    (inside / SECOND).symlink_to(outside / "x.safetensors")
    write_index(inside, {"a": FIRST, "b": SECOND})
    with pytest.raises(FormatError, match="outside of the checkpoint's directory"):
        read_checkpoint(inside)
    (inside / INDEX).unlink()
    with pytest.raises(FormatError, match="outside"):
        read_checkpoint(inside)
    (inside / SECOND).unlink()
    (inside / "model.safetensors").symlink_to(outside / "x.safetensors")
    with pytest.raises(FormatError, match="outside"):
        read_checkpoint(inside)
    assert list(read_checkpoint(inside / "model.safetensors").entries) == ["b", "c"], "what the user names is followed"
    (inside / "model.safetensors").unlink()
    (outside / INDEX).write_text(json.dumps({"weight_map": {"a": FIRST}}))
    (inside / INDEX).symlink_to(outside / INDEX)
    with pytest.raises(FormatError, match="outside"):
        read_checkpoint(inside)


def test_links_inside_the_directory_and_of_it_are_followed(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir()
    sharded(real)
    (real / FIRST).rename(real / "elsewhere.safetensors")
    (real / FIRST).symlink_to("elsewhere.safetensors")
    (tmp_path / "link").symlink_to(real)
    found = read_checkpoint(tmp_path / "link")
    assert sorted(found.entries) == ["a", "b", "c"]
    assert found.entries["a"].path == str(real / "elsewhere.safetensors")


def test_the_links_of_a_hub_cache_are_followed(tmp_path: Path) -> None:
    model = tmp_path / "models--org--name"
    snapshot, blobs = model / "snapshots" / "0123abc", model / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    sharded(blobs)
    for name in (FIRST, SECOND, INDEX):
        (blobs / name).rename(blobs / f"hash-{name[-8:]}-{len(name)}-{name[7]}{name[9:11]}")
    stored = {name: f"hash-{name[-8:]}-{len(name)}-{name[7]}{name[9:11]}" for name in (FIRST, SECOND, INDEX)}
    assert len(set(stored.values())) == 3
    for name, blob in stored.items():
        (snapshot / name).symlink_to(Path("../../blobs") / blob)
    assert sorted(read_checkpoint(snapshot).entries) == ["a", "b", "c"]
    (snapshot / FIRST).unlink()
    save(tmp_path / "secret.safetensors", ONE)
    (snapshot / FIRST).symlink_to(tmp_path / "secret.safetensors")
    with pytest.raises(FormatError, match="outside"):
        read_checkpoint(snapshot)
    (snapshot / FIRST).unlink()
    (blobs / "through").symlink_to(tmp_path / "secret.safetensors")  # a link by way of blobs leads out as well
    (snapshot / FIRST).symlink_to("../../blobs/through")
    with pytest.raises(FormatError, match="outside"):
        read_checkpoint(snapshot)


BROKEN = [
    b"", b"[]", b"null", b"{}", b'{"weight_map":[]}', b'{"weight_map":{}}', b'{"weight_map":null}', b"{", b"\xff{}",
    b'{"weight_map":{"a":"x.safetensors"},"weight_map":{}}',
    b'{"weight_map":{"a":"x.safetensors","a":"y.safetensors"}}',
    b'{"weight_map":' + b"[" * 100_000,
    b'{"weight_map":' + b'{"a":' * 100_000,
    b'{"a":' + b"[" * 900 + b"]" * 900 + b"}",
    b'{"weight_map":[' + b"0," * 400_001,
    b'{"weight_map":{' + b'"a":"",' * 400_001,
    b" " * (49 << 20),
]  # fmt: skip


@pytest.mark.parametrize("contents", BROKEN, ids=range(len(BROKEN)))
def test_broken_indices(tmp_path: Path, contents: bytes) -> None:
    sharded(tmp_path)
    (tmp_path / INDEX).write_bytes(contents)
    with pytest.raises(FormatError, match=INDEX):
        read_checkpoint(tmp_path)


def test_shards_that_are_no_files(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / SECOND).unlink()
    os.mkfifo(tmp_path / SECOND)
    with pytest.raises(FormatError, match="not a regular file"):
        read_checkpoint(tmp_path)
    (tmp_path / SECOND).unlink()
    (tmp_path / SECOND).mkdir()
    with pytest.raises(FormatError, match="not a regular file"):
        read_checkpoint(tmp_path)
    (tmp_path / SECOND).rmdir()
    (tmp_path / SECOND).symlink_to(SECOND)  # to itself
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickles_are_refused_with_the_way_to_convert(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04N.")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(PickleError, match="save_pretrained") as caught:
            read_checkpoint(path)
        assert name in str(caught.value)
        assert "sandbox" in str(caught.value)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there lies nothing"):
        read_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"looked for model\.safetensors.*there lies config\.json"):
        read_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="neither a directory nor"):
        read_checkpoint(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="does not exist"):
        read_checkpoint(tmp_path / "missing")


def test_every_prefix_of_a_shard_is_refused(tmp_path: Path) -> None:
    header, data = lay_out(ONE)
    contents = pack(header, data)
    for nbytes in range(len(contents)):
        (tmp_path / "model.safetensors").write_bytes(contents[:nbytes])
        with pytest.raises(FormatError):
            read_checkpoint(tmp_path)
