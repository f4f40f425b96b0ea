"""`offload bench plan`: predictions beside measurements, over a grid of configurations."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from offload.bench.cells import MODELS, grid, some
from offload.bench.ledger import Ledger
from offload.bench.page import page
from offload.bench.planning import PlanBench
from offload.bench.scores import scores
from offload.commands.early import beside


def execute(output: str, cells: int | None, folder: str | None, regrets: int, *, as_json: bool) -> int:
    """Runs what is left of the grid and writes three files: OUTPUT.jsonl, OUTPUT.json and OUTPUT.md.

    Raises:
        UsageError: files of something else.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    chosen = grid() if cells is None else some(grid(), cells)
    stem = Path(output)
    ledger = Ledger(beside(stem, ".jsonl"))
    where = Path(folder) if folder is not None else Path(tempfile.gettempdir()) / "offload-bench"
    where.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True, quiet=as_json)
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=as_json) as bar:
        task = bar.add_task("", total=len(chosen))

        def show(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        PlanBench(cells=chosen, models=MODELS, folder=where, ledger=ledger, regrets=regrets, progress=show).run()
    found = scores(ledger, chosen)
    beside(stem, ".json").write_text(json.dumps(found, indent=1) + "\n")
    beside(stem, ".md").write_text(page(found))
    if as_json:
        print(json.dumps(found))
    else:
        print(page(found))
    return 0
