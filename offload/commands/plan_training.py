"""`offload plan CONFIG.yaml`: what fine-tuning would take, as `offload finetune` says before it starts."""

from __future__ import annotations

import json

import transformers
from rich.console import Console

from offload.commands.early import Early
from offload.commands.finetune import data_of, read_data
from offload.commands.outlook import outlook_of
from offload.commands.plan_options import PlanRequest
from offload.commands.plan_text import places
from offload.commands.training import announce
from offload.finetune.config import Config
from offload.units import parse_bytes


def execute(request: PlanRequest, early: Early) -> int:
    """Plans and prints; returns the exit status. Nothing is written. Errors are raised, as by `offload finetune`."""
    transformers.utils.logging.set_verbosity_error()
    config, directory = early.config, early.directory
    quiet = Console(stderr=True, quiet=request.json)
    _, prepared, total = read_data(early, quiet)
    outlook = outlook_of(config, directory, total, request.hardware)
    if request.json:
        facts = {"model": config.model, "total_steps": total, "plan": outlook.as_dict(), "data": data_of(prepared)}
        print(json.dumps(facts))
        return 0
    console = Console()
    announce(config, prepared, total, outlook, console)
    console.print()
    console.print(places(outlook.classes(), {"host": _budget(config)}))
    return 0


def _budget(config: Config) -> int | None:
    asked = config.budgets.cpu_memory
    return None if asked is None else parse_bytes(asked, "budgets.cpu_memory")
