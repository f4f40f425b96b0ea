"""How soon a model can generate, beside the time that reading its resident set once takes.

    python benchmarks/ready.py --model DIR --cpu-memory 4GiB

Each round starts two fresh processes in turn: one reads as many bytes as stay in memory into fresh huge pages by the
I/O engine and does nothing else; the other loads the model. Both touch memory for the first time, which on some virtual
machines is several times slower than the disk: a rate measured into warm buffers would promise what nobody can keep.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

from report import RESULTS, checkpoint_bytes, hardware, machine_line, number, table, write
from runner import announce, run

from offload.hardware import versions

TARGET = 1.3


def arguments() -> argparse.Namespace:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    ap.add_argument("--cpu-memory", default="4GiB")
    ap.add_argument("--rounds", type=int, default=3)
    ap.add_argument("--pause", type=float, default=10.0, help="seconds between processes, for freed memory to settle")
    ap.add_argument("--out", type=Path, default=RESULTS)
    ap.add_argument("--part", choices=["read", "load"], help=argparse.SUPPRESS)
    ap.add_argument("--nbytes", type=int, default=0, help=argparse.SUPPRESS)
    return ap.parse_args()


def read(model: Path, nbytes: int) -> dict[str, Any]:
    """Reads the first `nbytes` of the checkpoint into memory that nobody touched before."""
    from offload.io.buffers import Buffer
    from offload.io.engine import Engine

    with Engine() as engine:
        began, at, futures = time.perf_counter(), 0, []
        buffer = Buffer(nbytes)
        for path in sorted(model.glob("*.safetensors")):
            file = engine.open(path)
            size = min(file.nbytes, nbytes - at) // file.block_alignment * file.block_alignment
            futures.append(engine.read(file, 0, buffer.view[at : at + size]))
            at += size
        for future in futures:
            future.result()
        return {"seconds": time.perf_counter() - began, "nbytes": at}


def load(model: Path, cpu_memory: str) -> dict[str, Any]:
    """Loads the model. What transformers imports when it first builds a model is timed by a dry run before."""
    import transformers.generation  # noqa: F401  (so that it is not counted)

    from offload.api import load

    began = time.perf_counter()
    load(model, cpu_memory=cpu_memory, context=64, dry_run=True).close()
    imports_s = time.perf_counter() - began
    with (handle := load(model, cpu_memory=cpu_memory, context=64)):
        return {"seconds": handle.ready_s, "imports_s": imports_s, "nbytes": handle.session.store.fill_nbytes()}


def main() -> None:
    a = arguments()
    if a.part:
        print(json.dumps(read(a.model, a.nbytes) if a.part == "read" else load(a.model, a.cpu_memory)))
        return
    lines: list[dict[str, Any]] = []
    nbytes = 0
    for number_of_round in range(a.rounds + 1):
        for part in ("read", "load"):
            if part == "read" and not nbytes:
                continue  # the first load tells how much stays; it is not counted
            time.sleep(a.pause)
            command = [sys.executable, __file__, "--model", str(a.model), "--cpu-memory", a.cpu_memory]
            line = run([*command, "--part", part, "--nbytes", str(nbytes)], timeout_s=300)
            announce(line, f"round {number_of_round}, {part}, {line['seconds']:.2f} s")
            nbytes = line["nbytes"] if part == "load" else nbytes
            if number_of_round:
                lines.append(line | {"part": part, "round": number_of_round})
    seconds = {part: median(line["seconds"] for line in lines if line["part"] == part) for part in ("read", "load")}
    imports = median(line["imports_s"] for line in lines if line["part"] == "load")
    ratio = seconds["load"] / seconds["read"]
    rows = [
        [
            "reading the resident set into fresh memory",
            number(seconds["read"]),
            number(nbytes / seconds["read"], scale=1e9),
        ],
        ["offload.load until it can generate", number(seconds["load"]), ""],
        ["first in its process, it also imports transformers' model code", f"+ {number(imports)}", ""],
    ]
    facts = hardware(a.model)
    size = checkpoint_bytes(a.model) / 1e9
    page = (
        f"# Ready to generate, {date.today()}\n\n{machine_line(facts)} Model: {size:.2f} GB, "
        f"cpu_memory {a.cpu_memory}, {nbytes / 1e9:.2f} GB resident; medians of {a.rounds} rounds.\n\n"
        + table(["what", "seconds", "GB/s"], rows)
        + f"\n\n{ratio:.2f} times the reading; target {TARGET}.\n"
    )
    print(page)
    result = {"hardware": facts, "versions": versions(), "ratio": ratio, "seconds": seconds, "imports_s": imports}
    write("ready", result | {"lines": lines}, page, a.out)


if __name__ == "__main__":
    main()
