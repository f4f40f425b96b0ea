"""Hostile headers by hand: each is refused, and the message says what was found."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from io_safetensors import GOOD, one, pack, raw_one, tensor

from offload.errors import FormatError
from offload.io.safetensors import read_header

HOSTILE: dict[str, tuple[bytes, str]] = {
    # the frame
    "empty file": (b"", "0 bytes"),
    "shorter than a length": (b"\2\0\0", "3 bytes"),
    "length without a header": (struct.pack("<Q", 2), "8 bytes"),
    "header of 0 bytes": (pack(b"", b"12345"), "claims 0 bytes"),
    "header of 1 byte": (pack(b"{", b"12345"), "claims 1 bytes"),
    "length beyond the file": (pack({}, nbytes=3), "claims 3 bytes"),
    "length of 2**63": (pack({}, nbytes=2**63), "claims 9,223,372,036,854,775,808"),
    "length of 2**64 - 1": (pack({}, nbytes=2**64 - 1), "claims 18,446,744,073,709,551,615"),
    "length above the format's": (pack({}, nbytes=100_000_001), "claims 100,000,001"),
    "big-endian length": (struct.pack(">Q", 2) + b"{}", "claims"),
    "a pickle": (b"\x80\x04\x95" + bytes(40), "claims"),
    "a zip": (b"PK\x03\x04" + bytes(60), "claims"),
    "an ELF polyglot": (b"\x7fELF" + bytes(60), "claims"),
    "header begins with white space": (pack(b" {}"), "begins with"),
    "header begins with a byte order mark": (pack(b"\xef\xbb\xbf{}"), "begins with"),
    "header is a list": (pack(b"[{}]"), "begins with"),
    "header is in UTF-16": (pack("{}".encode("utf-16-le")), "begins no name"),
    "header ends early": (pack(b'{"t":'), "expected a flat object"),
    "header is not closed": (pack(b'{"t":' + GOOD.encode(), b"1234"), "expected ','"),
    "text after the header": (pack(b"{}{}"), "begins no name"),
    "text after the last tensor": (raw_one(GOOD + "}x"), "follows its end"),
    "NUL padding after the header": (raw_one(GOOD + "}\0"), "follows its end"),
    "trailing comma": (raw_one(GOOD + ","), "begins no name"),
    "comma only": (pack(b"{,}"), "begins no name"),
    "semicolon": (pack(b'{"t";1}'), "begins no name"),
    "bare name": (pack(b"{t:1}"), "begins no name"),
    "single quotes": (pack(b"{'t':1}"), "begins no name"),
    "comment": (pack(b"{/**/}"), "begins no name"),
    # names
    "name not UTF-8": (pack(b'{"\xff":' + GOOD.encode() + b"}", b"1234"), "not valid JSON in UTF-8"),
    "overlong UTF-8": (pack(b'{"\xc0\xaf":' + GOOD.encode() + b"}", b"1234"), "not valid JSON in UTF-8"),
    "name with half a surrogate pair": (pack(b'{"\\ud800":' + GOOD.encode() + b"}", b"1234"), "not valid JSON"),
    "name with a bad escape": (pack(b'{"\\x41":' + GOOD.encode() + b"}", b"1234"), "not valid JSON"),
    "name with a raw newline": (pack(b'{"a\nb":' + GOOD.encode() + b"}", b"1234"), "begins no name"),
    "name too long": (one(tensor(), name="n" * 1025), "at most 1,024"),
    "name of escapes too long": (pack(('{"' + "\\u0041" * 1025 + '":1}').encode()), "begins no name|at most 1,024"),
    "name twice": (pack(f'{{"t":{GOOD},"t":{GOOD}}}'.encode(), b"1234"), "occurs twice"),
    "name twice, once escaped": (pack(f'{{"t":{GOOD},"\\u0074":{GOOD}}}'.encode(), b"1234"), "occurs twice"),
    # values
    "value null": (one(None), "flat object"),
    "value a number": (one(1), "flat object"),
    "value a list": (one([]), "flat object"),
    "value nested": (one({"dtype": {}}), "flat object"),
    "value empty": (one({}), "found the fields"),
    "value huge": (one(tensor(shape=[1] * 5000)), "at most 4096 bytes"),
    "no dtype": (raw_one('{"shape":[4],"data_offsets":[0,4]}'), "found the fields"),
    "no shape": (raw_one('{"dtype":"U8","data_offsets":[0,4]}'), "found the fields"),
    "no offsets": (raw_one('{"dtype":"U8","shape":[4]}'), "found the fields"),
    "one field more": (one(tensor(evil=1)), "evil"),
    "field twice": (raw_one('{"dtype":"U8","dtype":"U8","shape":[4],"data_offsets":[0,4]}'), "key occurs twice"),
    "field twice, once escaped": (
        raw_one('{"dtype":"U8","\\u0064type":"U8","shape":[4],"data_offsets":[0,4]}'), "key occurs twice",
    ),
    "brackets 4,000 deep": (raw_one('{"dtype":' + "[" * 4000 + "}"), "not valid"),
    # dtypes
    "unknown dtype": (one(tensor("F128")), "'F128' is not known"),
    "dtype in small letters": (one(tensor("u8")), "'u8' is not known"),
    "dtype empty": (one(tensor("")), "'' is not known"),
    "dtype a number": (one(tensor(8)), "8 is not known"),
    "dtype null": (one(tensor(None)), "None is not known"),
    "dtype a list": (one(tensor(["U8"])), "is not known"),
    # shapes
    "shape null": (one(tensor(shape=None)), "shape None"),
    "shape a number": (one(tensor(shape=4)), "shape 4"),
    "shape of text": (one(tensor(shape=["4"])), "whole numbers"),
    "shape of bools": (one(tensor(shape=[True], offsets=[0, 1]), b"1"), "whole numbers"),
    "shape of floats": (one(tensor(shape=[4.0])), "not a whole number"),
    "shape of lists": (one(tensor(shape=[[4]])), "whole numbers"),
    "shape negative": (one(tensor(shape=[-4])), "'-'"),
    "shape twice negative": (one(tensor(shape=[-2, -2])), "'-'"),
    "shape minus zero": (raw_one('{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}', b""), "'-'"),
    "shape NaN": (raw_one('{"dtype":"U8","shape":[NaN],"data_offsets":[0,4]}'), "not a whole number"),
    "shape Infinity": (raw_one('{"dtype":"U8","shape":[Infinity],"data_offsets":[0,4]}'), "not a whole number"),
    "shape 4e0": (raw_one('{"dtype":"U8","shape":[4e0],"data_offsets":[0,4]}'), "not a whole number"),
    "shape 04": (raw_one('{"dtype":"U8","shape":[04],"data_offsets":[0,4]}'), "not valid"),
    "shape 0x4": (raw_one('{"dtype":"U8","shape":[0x4],"data_offsets":[0,4]}'), "not valid"),
    "rank 65": (one(tensor(shape=[1] * 64 + [4])), "up to 64"),
    "shape overflows to 4 in 64 bits": (one(tensor(shape=[4194305, 4194305, 211106198978564])), "overflows 64 bits"),
    "shape overflows beside a zero": (one(tensor(shape=[2**40, 2**40, 0], offsets=[0, 0]), b""), "overflows 64 bits"),
    "zero beside an overflow": (one(tensor(shape=[0, 2**63], offsets=[0, 0]), b""), "overflows 64 bits"),
    "a number of 4,000 digits": (one(tensor(shape=[10**3900])), "overflows 64 bits"),
    # offsets
    "offsets null": (one(tensor(offsets=None)), "two whole numbers"),
    "one offset": (one(tensor(offsets=[0])), "two whole numbers"),
    "three offsets": (one(tensor(offsets=[0, 2, 4])), "two whole numbers"),
    "offsets of bools": (one(tensor(shape=[1], offsets=[False, True]), b"1"), "two whole numbers"),
    "offsets of floats": (one(tensor(offsets=[0.0, 4.0])), "not a whole number"),
    "offsets of text": (one(tensor(offsets=["0", "4"])), "two whole numbers"),
    "offsets negative": (one(tensor(offsets=[-4, 0])), "'-'"),
    "offsets reversed": (one(tensor(offsets=[4, 0])), "leave the 4 data bytes"),
    "offsets beyond the file": (one(tensor(shape=[8], offsets=[0, 8])), "leave the 4 data bytes"),
    "offsets of 2**64": (one(tensor(offsets=[2**64, 2**64 + 4])), "leave the 4 data bytes"),
    "smaller than its shape": (one(tensor(shape=[5])), "takes 5 bytes"),
    "larger than its shape": (one(tensor(shape=[3])), "takes 3 bytes"),
    "size of another dtype": (one(tensor("F32")), "takes 16 bytes"),
    "half a byte": (one(tensor("F4", [7], [0, 3]), b"123"), "takes 3.5 bytes"),
    "half a byte rounded up": (one(tensor("F4", [7], [0, 4])), "takes 3.5 bytes"),
    "six bits": (one(tensor("F6_E2M3", [1], [0, 1]), b"1"), "takes 0.75 bytes"),
    "starts after a hole": (one(tensor(offsets=[1, 5]), b"12345"), "a hole"),
    "a hole": (pack({"a": tensor(), "b": tensor(offsets=[5, 9])}, b"123456789"), "tensor 'b': a hole"),
    "an overlap": (pack({"a": tensor(), "b": tensor(offsets=[3, 7])}, b"12345678"), "tensor 'b': an overlap"),
    "the same bytes twice": (pack({"a": tensor(), "b": tensor()}, b"1234"), "overlap"),
    "an empty tensor in a hole": (one(tensor(shape=[0], offsets=[2, 2]), b""), "leave the 0 data bytes"),
    "an empty tensor inside another": (
        pack({"a": tensor(), "b": tensor(shape=[0], offsets=[2, 2])}, b"1234"), "an overlap",
    ),
    "bytes after the last tensor": (one(tensor(), b"12345"), "1 bytes follow the last tensor"),
    "bytes and no tensor": (pack({}, b"PK"), "2 bytes follow"),
    # metadata
    "metadata null": (pack({"__metadata__": None}), "begins with"),
    "metadata a list": (pack({"__metadata__": []}), "begins with"),
    "metadata of numbers": (pack({"__metadata__": {"a": 1}}), "expected a string"),
    "metadata nested": (pack({"__metadata__": {"a": {}}}), "expected a string"),
    "metadata key twice": (pack(b'{"__metadata__":{"a":"1","a":"2"}}'), "'a' occurs twice"),
    "metadata twice": (pack(b'{"__metadata__":{},"__metadata__":{}}'), "__metadata__ occurs twice"),
    "metadata not closed": (pack(b'{"__metadata__":{"a":"b"'), "object of strings"),
    "metadata with a trailing comma": (pack(b'{"__metadata__":{"a":"b",}}'), "expected a string"),
    "metadata without a colon": (pack(b'{"__metadata__":{"a" "b"}}'), "expected ':'"),
    "metadata without a comma": (pack(b'{"__metadata__":{"a":"b" "c":"d"}}'), "expected ','"),
    "metadata not UTF-8": (pack(b'{"__metadata__":{"a":"\xff"}}'), "object of strings"),
    "metadata with half a surrogate pair": (pack(b'{"__metadata__":{"a":"\\ud800"}}'), "object of strings"),
    "metadata with a raw control character": (pack(b'{"__metadata__":{"a":"\1"}}'), "object of strings"),
    "metadata with 10,001 keys": (pack({"__metadata__": {str(i): "" for i in range(10_001)}}), "one too many"),
    "metadata as a tensor's name": (pack({"__metadata__": tensor()}, b"1234"), "object of strings"),
}  # fmt: skip


def test_the_corpus_is_large() -> None:
    assert len(HOSTILE) >= 100


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile(tmp_path: Path, case: str) -> None:
    contents, message = HOSTILE[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(contents)
    with pytest.raises(FormatError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value), "the error names the file"
    assert len(str(caught.value)) < 1000, "a hostile file does not decide how long the message is"
