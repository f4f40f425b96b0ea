"""`offload report`: one self-contained page about a run, from the files that the run left."""

from __future__ import annotations

import sys
from pathlib import Path

from offload.commands.options import check_place
from offload.errors import UsageError
from offload.report import page, read_run, read_trace
from offload.units import format_bytes


def execute(run: str, trace: str | None, out: str) -> int:
    """Writes the page; returns the exit status. Errors are raised."""
    check_place("-o", out, replaces=True)
    text = page(read_run(run), read_trace(trace) if trace is not None else None).encode()
    target = Path(out)
    part = target.with_name(target.name + ".part")
    try:
        part.write_bytes(text)
        part.replace(target)
    except OSError as error:
        raise UsageError(f"-o {out} cannot be written: {error.strerror}") from error
    print(f"{out}: {format_bytes(len(text))}", file=sys.stderr)
    return 0
