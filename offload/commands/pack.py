"""`offload pack`: a checkpoint in fewer bits, what it saved, and what it cost in precision."""

from __future__ import annotations

import json
from statistics import mean

import transformers
from rich.console import Console

from offload.api import pack
from offload.commands.bar import bar
from offload.commands.telling import note, say
from offload.units import format_bytes, format_seconds


def execute(model: str, out: str, weights: str, io: str, *, as_json: bool) -> int:
    """Packs; returns the exit status. Errors are raised."""
    transformers.utils.logging.set_verbosity_error()
    console = Console(stderr=True, quiet=as_json)
    with bar(console) as progress:
        report = pack(model, out, weights=weights, io=io, progress=progress)
    errors = report.packed
    worst = max(errors, key=lambda n: errors[n], default=None)
    if as_json:
        facts = {
            "model": model, "out": out, "weights": weights, "read_bytes": report.read_nbytes,
            "written_bytes": report.written_nbytes, "seconds": report.seconds, "packed": len(errors),
            "kept": report.kept, "errors": errors,
        }  # fmt: skip
        print(json.dumps(facts))
        return 0
    say(
        console,
        f"{out}: {len(errors)} matrices packed as {weights}; {format_bytes(report.read_nbytes)} became "
        f"{format_bytes(report.written_nbytes)} in {format_seconds(report.seconds)}",
        style="",
    )
    if worst is not None and errors[worst]:
        found = f"{mean(errors.values()):.2%} on average, {errors[worst]:.2%} in {worst}"
        say(console, f"relative error of a matrix: {found}", style="")
    for name in report.kept:
        note(console, f"{name} would not get smaller and stays as it is")
    return 0
