"""What the worst headers cost, in a process of its own: under 64 MiB, and never a parser that does not come back.

Each takes under a second of CPU time on a quiet core; that is printed and not asserted, for a machine may be slow or
shared. The system ends a reader that takes `HANGS_S`, as one whose work grows with the square of a header's size does.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from io_safetensors import pack

from offload.io.safetensors import Limits, read_header

MIB = 1 << 20
FULL = Limits().header_nbytes
COUNT = Limits().tensors
HANGS_S = 30  # seconds of CPU time; what is linear in the header's size takes less than one


def fill(start: str, part: str, nbytes: int = FULL, end: str = "") -> bytes:
    """A header of `nbytes`: start, the part again and again, end."""
    raw = start.encode() + part.encode() * ((nbytes - len(start) - len(end)) // len(part.encode())) + end.encode()
    return pack(raw + b" " * (nbytes - len(raw)))


def entries(shape: str, name: Callable[[int], str] = str, count: int = COUNT + 5) -> bytes:
    """Empty tensors in their thousands, as many as fit, each of them right."""
    parts, size = [], 0
    for i in range(count):
        part = f'"{name(i)}":{{"dtype":"U8","shape":{shape},"data_offsets":[0,0]}}'
        size += len(part.encode()) + 1
        if size > FULL - 100:
            break
        parts.append(part)
    return pack(("{" + ",".join(parts) + ',"last":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}').encode())


WORST: dict[str, Callable[[], bytes]] = {
    "100 MB of brackets": lambda: struct.pack("<Q", 100_000_000) + b'{"a":' + b"[" * (100_000_000 - 5),
    "brackets": lambda: fill('{"a":', "["),
    "objects in each other": lambda: fill("", '{"a":'),
    "flat lists": lambda: fill('{"a":', "[],"),
    "tiny keys": lambda: fill("{", '"a":0,'),
    "tiny entries": lambda: fill("{", '"a":{},'),
    "white space": lambda: fill("{", " "),
    "white space after a name": lambda: fill('{"a"', " "),
    "white space at the end": lambda: fill('{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}', " "),
    "one name": lambda: fill('{"', "a"),
    "one name of escapes": lambda: fill('{"', "\\\\"),
    "one name of quotes": lambda: fill('{"', '\\"'),
    "one digit string": lambda: fill('{"a":{"dtype":"U8","shape":[', "9"),
    "metadata of emoji": lambda: fill('{"__metadata__":{"a":"', "😀", end='"}}'),
    "metadata of escapes": lambda: fill('{"__metadata__":{"a":"', "\\ud83d\\ude00", end='"}}'),
    "metadata of pairs": lambda: pack(
        ('{"__metadata__":{' + ",".join(f'"{i}":""' for i in range(100_000)) + "}}").encode()
    ),
    "metadata of white space": lambda: fill('{"__metadata__":{"a"', " "),
    "right until the last": lambda: entries("[0]", count=COUNT - 1),
    "one tensor too many": lambda: entries("[0]"),
    "long names": lambda: entries("[0]", name=lambda i: f"{i:01000d}"),
    "as large as may be": lambda: entries("[0,7,7]", name=lambda i: f"{i:0120d}"),
    "names of emoji": lambda: entries("[0]", name=lambda i: f"{i}" + "😀" * 200),
    "many dimensions": lambda: entries("[0" + ",1" * 63 + "]"),
    "many large dimensions": lambda: entries("[" + "1000," * 3 + "0]"),
    "many large dimensions and long names": lambda: entries("[1000,2000,3000,0]", name=lambda i: f"{i:070d}"),
}

CHILD = """
import os, resource, sys, time
from offload.errors import FormatError
from offload.io.safetensors import read_header
def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) * 1024
for path in sys.stdin:
    if os.fork():  # a fresh heap for each file, or memory kept from the one before would hide what this one takes
        if os.wait()[1]:
            print("killed", sys.argv[1], 0, flush=True)
        continue
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forget the peak
    resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[1]),) * 2)
    before, began = status("VmRSS"), time.process_time()
    try:
        read_header(path.strip())
        outcome = "accepted"
    except FormatError as error:
        outcome = "refused"
    print(outcome, time.process_time() - began, status("VmHWM") - before, flush=True)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def child() -> Iterator[Callable[[Path], tuple[str, float, int]]]:
    """Reads headers in another process: outcome, CPU seconds, bytes of memory more than before."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pytest.skip("this system does not reset a process's memory peak")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", CHILD, str(HANGS_S)], text=True, **pipes) as at:

        def read(path: Path) -> tuple[str, float, int]:
            assert at.stdin is not None
            assert at.stdout is not None
            at.stdin.write(f"{path}\n")
            at.stdin.flush()
            outcome, seconds, nbytes = at.stdout.readline().split()
            return outcome, float(seconds), int(nbytes)

        yield read
        assert at.stdin is not None
        at.stdin.close()


@pytest.mark.parametrize("case", WORST)
def test_the_worst(tmp_path: Path, child: Callable[[Path], tuple[str, float, int]], case: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(WORST[case]())
    outcome, seconds, nbytes = child(path)
    path.unlink()
    print(f"{case}: {seconds:.2f} s, {nbytes / MIB:.1f} MiB")
    assert outcome == "refused"
    assert nbytes < 64 * MIB, f"{nbytes / MIB:.1f} MiB"


def test_a_hundred_thousand_tensors_are_read(tmp_path: Path) -> None:
    header = {
        f"model.layers.{i % 61}.mlp.experts.{i}.down_proj.weight_scale_inv": {
            "dtype": "F32", "shape": [2, 1], "data_offsets": [8 * i, 8 * i + 8],
        }
        for i in range(100_000)
    }  # fmt: skip
    path = tmp_path / "file"
    with open(path, "wb") as file:
        file.write(pack(json.dumps(header, separators=(",", ":")).encode()))
        file.truncate(file.tell() + 800_000)
    found = read_header(path)
    assert len(found.entries) == 100_000
    assert found.entries[-1].offset + 8 == found.file_nbytes
