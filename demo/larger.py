"""The demo's second part: a model larger than its memory budget decodes, and the figures stand beside the bound.

The run is the real command line in a process of its own, so that its peak memory is that of a fresh process. The disk
is measured before and after it as well as by the run itself; the bound takes the best of the three rates.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from checkpoint import SIZES, Shape, write
from folders import SCRATCH, whole
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from offload.hardware import cpu_info, host_memory
from offload.io.rate import read_rate
from offload.units import GIB, MIB

FULL = SIZES["3b"]
BUDGET = 4 * GIB
SPARE_DISK = 1_900_000_000  # bytes of disk to leave free
SPARE_MEMORY = 512 * MIB  # bytes of main memory to leave free
GRAIN = 64 * MIB  # a budget is a multiple of it
FEWEST_LAYERS = 6
PROMPT_TOKENS, NEW_TOKENS = 32, 17
INTERPRETER = 450_000_000  # bytes that Python, torch and transformers take without any weights


class TooSmall(Exception):
    """This machine lacks the disk or the memory for a run that would show anything."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is run: a shape, where its checkpoint lies, the memory budget, and why it is less than it should be."""

    shape: Shape
    folder: Path
    budget: int
    notes: tuple[str, ...]


def plan() -> Plan:
    """The 3B shape under 4 GiB, or as much of it as this machine has disk and memory for.

    Raises:
        TooSmall: not even a few layers fit.
    """
    notes = []
    SCRATCH.mkdir(exist_ok=True)
    shape = FULL
    if not _folder(FULL).is_dir():
        free = shutil.disk_usage(SCRATCH).free
        layer = replace(FULL, layers=2).nbytes - replace(FULL, layers=1).nbytes
        fixed = FULL.nbytes - FULL.layers * layer
        layers = min(FULL.layers, (free - SPARE_DISK - fixed) // layer)
        if layers < FEWEST_LAYERS:
            least = SPARE_DISK + replace(FULL, layers=FEWEST_LAYERS).nbytes
            raise TooSmall(f"the disk has {free / 1e9:.1f} GB free; this part needs at least {least / 1e9:.1f} GB")
        shape = replace(FULL, layers=layers)
        if layers < FULL.layers:
            notes.append(
                f"The disk has {free / 1e9:.1f} GB free, so the checkpoint has {layers} of {FULL.layers} layers: "
                f"{shape.nbytes / 1e9:.2f} GB in place of {FULL.nbytes / 1e9:.2f} GB."
            )
    memory = host_memory()
    free = min(memory.available, memory.limit_free if memory.limit_free is not None else memory.available)
    wanted = BUDGET * shape.nbytes // FULL.nbytes  # less for a smaller model, so that it streams as well
    budget = min(wanted, free - SPARE_MEMORY) // GRAIN * GRAIN
    if budget < wanted // GRAIN * GRAIN:
        notes.append(f"Main memory has {free / GIB:.1f} GiB free, so the budget is {budget / GIB:.2f} GiB.")
    if budget <= INTERPRETER:
        raise TooSmall(f"main memory has {free / GIB:.1f} GiB free, which is too little for Python, torch and a model")
    return Plan(shape=shape, folder=_folder(shape), budget=budget, notes=tuple(notes))


def _folder(shape: Shape) -> Path:
    return SCRATCH / f"random-llama-{shape.layers}-layers"


def make(plan: Plan, console: Console) -> None:
    """Writes the checkpoint, unless an earlier run has."""
    if plan.folder.is_dir():
        return
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, console=console, transient=True) as bar, whole(plan.folder) as part:
        task = bar.add_task("writing random weights", total=plan.shape.nbytes)
        threads = max(1, min(4, cpu_info().cores))
        write(part, plan.shape, threads=threads, progress=lambda done, total: bar.update(task, completed=done))


def decode(plan: Plan) -> dict[str, Any]:
    """What `offload run --json` prints, with `disk_rates`: bytes per second before, during and after it.

    Raises:
        CalledProcessError: it failed; its message is on the terminal.
    """
    shard = max(plan.folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    rates = [read_rate(shard, seconds=1)]
    prompt = ",".join(map(str, range(3, 3 + PROMPT_TOKENS)))
    command = [sys.executable, "-m", "offload.cli", "run", str(plan.folder), "--prompt-ids", prompt, "--ignore-eos"]
    command += ["--max-new-tokens", str(NEW_TOKENS), "--cpu-memory", str(plan.budget), "--json"]
    report: dict[str, Any] = json.loads(output_of(command))
    rates += [report["disk_bytes_per_s"] or 0.0, read_rate(shard, seconds=1)]
    return report | {"disk_rates": rates}


def output_of(command: list[str]) -> str:
    """Standard output of a command, which on Ctrl-C is given time to clean up after itself."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            output, _ = process.communicate()
        except KeyboardInterrupt:
            process.wait(timeout=10)
            raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return output


def table(plan: Plan, report: dict[str, Any]) -> Table:
    """The figures of a run beside what transformers alone would need."""
    step, read, rates = report["decode_s_per_token"], report["read_bytes_per_token"], report["disk_rates"]
    disk_s, compute_s = read / max(rates), report["bound"]["compute_s"]
    bound = max(disk_s, compute_s)
    size = report["checkpoint_bytes"]
    result = Table("", "offload", "transformers alone", header_style="bold", box=SIMPLE_HEAD)
    for row in (
        ("checkpoint", _gb(size), _gb(size)),
        ("memory budget", f"{plan.budget / GIB:.2f} GiB = {_gb(plan.budget)}", "none"),
        ("peak memory", _gb(report["peak_rss_bytes"]), f"needs about {(size + INTERPRETER) / 1e9:.1f} GB"),
        ("time for a token", f"{step:.2f} s"),
        ("read for a token", _gb(read)),
        ("disk before, during, after", ", ".join(f"{r / 1e9:.2f}" for r in rates) + " GB/s"),
        ("lower bound for a token", f"{bound:.2f} s ({'disk' if disk_s >= compute_s else 'processor'})"),
        ("fraction of the bound", f"{bound / step:.0%}"),
    ):
        result.add_row(*row)
    return result


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB"
