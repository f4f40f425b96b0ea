"""What `make demo` runs: a trained model gives the same answer streamed; a model larger than its memory decodes.

    python demo/demo.py             # checkpoints stay in demo/scratch/, so a second run is quick

Ends with status 0 when both parts did what they say, 1 when one did not, 130 on Ctrl-C.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from answer import UNAVAILABLE
from larger import TooSmall, decode, make, plan, table
from rich.console import Console

from offload.units import format_seconds

HERE = Path(__file__).parent


def same_answer(console: Console) -> bool:
    """The first part, in a process of its own."""
    console.rule("1. A trained model, three quarters of it streaming, gives the same answer")
    with subprocess.Popen([sys.executable, str(HERE / "answer.py")]) as process:
        try:
            status = process.wait()
        except KeyboardInterrupt:
            process.wait(timeout=10)  # it got the signal too and removes what is half made
            raise
    if status == 130:
        raise KeyboardInterrupt
    if status == UNAVAILABLE:
        console.print("This part needs a package index once; the next part needs none.")
    return status == 0


def larger_than_memory(console: Console) -> bool:
    """The second part."""
    console.rule("2. A model larger than its memory budget")
    try:
        todo = plan()
    except TooSmall as error:
        console.print(f"[yellow]Not run: {error}.[/]")
        return False
    for note in todo.notes:
        console.print(f"[yellow]{note}[/]")
    make(todo, console)
    console.print(
        f"A Llama of {todo.shape.nbytes / 2e9:.2f} B random weights in bf16, {todo.shape.layers} layers, "
        "decodes one token after the other:\n"
    )
    try:
        with console.status("measuring the disk, filling memory, decoding"):
            report = decode(todo)
    except subprocess.CalledProcessError as error:
        console.print(f"[red]offload run ended with status {error.returncode}[/]")
        return False
    console.print(table(todo, report))
    for fallback in report["fallbacks"]:
        console.print(f"[yellow]note: {fallback}[/]")
    is_kept = report["peak_rss_bytes"] <= todo.budget
    console.print("[green]The budget was kept.[/]" if is_kept else "[red]The process took more than its budget.[/]")
    return bool(is_kept)


def main() -> int:
    console = Console(highlight=False)
    began = time.perf_counter()
    try:
        results = [same_answer(console), larger_than_memory(console)]
    except KeyboardInterrupt:
        console.print("\ninterrupted; nothing half made is left")
        return 130
    except OSError as error:
        console.print(f"[red]{error}[/]")
        return 1
    took = format_seconds(time.perf_counter() - began)
    console.print(f"\n[dim]{took} in all; the checkpoints stay in demo/scratch for the next time[/]")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
