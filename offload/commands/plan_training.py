"""`offload plan CONFIG.yaml`: what fine-tuning would take, as `offload finetune` says before it starts."""

from __future__ import annotations

import json
from dataclasses import fields

import transformers
from rich.console import Console

from offload.checkpoint import find
from offload.commands.finetune import data_of, read_data
from offload.commands.outlook import outlook_of
from offload.commands.plan import PlanRequest
from offload.commands.plan_text import places
from offload.commands.training import announce
from offload.errors import UsageError
from offload.finetune.config import Config
from offload.finetune.reading import read_config
from offload.units import parse_bytes

APPLIES = ("model", "overrides", "cpu_memory", "hardware", "json")  # everything else is said in the file


def execute(request: PlanRequest) -> int:
    """Plans and prints; returns the exit status. Nothing is written.

    Raises:
        UsageError: an option that a configuration has a key for; see also `offload finetune`.
    """
    transformers.utils.logging.set_verbosity_error()
    if strange := [f.name for f in fields(PlanRequest) if _is_strange(request, f.name, f.default)]:
        raise UsageError(
            f"--{strange[0].replace('_', '-')} goes with a model; {request.model} is a fine-tuning configuration, "
            "whose own keys say it (key=value lays over them). With one go --cpu-memory, --hardware and --json"
        )
    said = [] if request.cpu_memory is None else [f"budgets.cpu_memory={request.cpu_memory}"]
    config = read_config(request.model, [*request.overrides, *said])
    directory = find(config.model)
    quiet = Console(stderr=True, quiet=request.json)
    _, prepared, total = read_data(config, directory, quiet)
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


def _is_strange(request: PlanRequest, name: str, default: object) -> bool:
    return name not in APPLIES and getattr(request, name) != default
