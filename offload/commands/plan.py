"""`offload plan`: what a run would take and why, without making it."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

from rich.console import Console

from offload.budgets import parse_resident, resolve
from offload.checkpoint import find
from offload.checkpoint.numbers import numbers
from offload.commands.early import Early, check
from offload.commands.options import check_place
from offload.commands.plan_options import PlanRequest
from offload.commands.plan_text import show
from offload.errors import UsageError
from offload.hardware import gpus
from offload.plan import (
    NEAR,
    Ask,
    Plan,
    SavedPlan,
    best_batch,
    budgets_of,
    digest,
    machine,
    make,
    predicted_of,
    process_nbytes,
    save,
)
from offload.planner.whatif import parse_change
from offload.specs import Workload, check_length
from offload.tiers.names import OWN, parse_link
from offload.units import parse_memory

CONFIGS = (".yaml", ".yml")  # of fine-tuning, in place of a model
WITH_CONFIGS = ("model", "overrides", "cpu_memory", "hardware", "json")  # options; everything else is said in the file


def execute(request: PlanRequest) -> int:
    """Plans and prints; returns the exit status. Errors are raised."""
    if Path(request.model).suffix in CONFIGS and not Path(request.model).is_dir():
        early = _early(request)
        from offload.commands import plan_training  # needs torch

        return plan_training.execute(request, early)
    if request.overrides:
        raise UsageError(
            f"{request.overrides[0]!r} is laid over a fine-tuning configuration, and {request.model} is none (a .yaml "
            "file); of a model, options say what to plan for: see offload plan --help"
        )
    if request.output is not None:
        check_place("-o", request.output, replaces=True)
    plan = plan_of(request)
    if request.output is not None:
        save(_saved(plan, request), request.output)
    if request.json:
        print(json.dumps({"model": request.model, **plan.as_dict()}))
    else:
        show(plan, Console())
    return 0


def _early(request: PlanRequest) -> Early:
    if strange := [f.name for f in fields(request) if _is_strange(request, f.name, f.default)]:
        raise UsageError(
            f"--{strange[0].replace('_', '-')} goes with a model; {request.model} is a fine-tuning configuration, "
            "whose own keys say it (key=value lays over them). With one go --cpu-memory, --hardware and --json"
        )
    said = [] if request.cpu_memory is None else [f"budgets.cpu_memory={request.cpu_memory}"]
    return check(request.model, [*request.overrides, *said], quiet=request.json)


def _is_strange(request: PlanRequest, name: str, default: object) -> bool:
    return name not in WITH_CONFIGS and getattr(request, name) != default


def plan_of(request: PlanRequest) -> Plan:
    """The plan of a request.

    Raises:
        UsageError, CheckpointError, BudgetError: see offload.errors.
    """
    changes = [parse_change(text) for text in request.what_if]
    ask = ask_of(request)
    lacking = {"gpu-memory", "link", "gpu"} if ask.budgets.gpu_memory is None else set()
    if ask.computer.processor != "device":
        lacking.add("gpu")
    for change in changes:
        if change.what in lacking:
            raise UsageError(
                f"--what-if {change.what}: this machine has none; plan for one that has: --hardware PRESET, or "
                '--device emulated --gpu-memory 8GiB --link "8GB/s" for its memory and link'
            )
    return make(best_batch(ask) if request.batch == "auto" else ask, changes)


def ask_of(request: PlanRequest) -> Ask:
    """The model, the machine and the work of a request; one sequence where the batch is still to be chosen.

    Raises:
        UsageError, CheckpointError: see offload.errors.
    """
    is_auto = request.batch == "auto"
    if not is_auto and (not request.batch.isdecimal() or not 1 <= int(request.batch) <= 100_000):
        raise UsageError(f'--batch {request.batch}: a number of sequences from 1, or "auto"')
    if request.slots is not None and request.slots < 1:
        raise UsageError(f"--slots {request.slots}: a ring has at least 1 slot")
    link = parse_link(request.link, request.device or OWN)
    directory = find(request.model)
    profile = machine(request.hardware, directory)
    known = numbers(directory, dtype=request.dtype, weights=request.weights, exact=request.exact)
    check_length(request.prompt_tokens, request.new_tokens, known.spec.max_tokens)
    if request.hardware is None or request.device is not None:
        budgets = resolve(
            cpu_memory=request.cpu_memory,
            gpu_memory=request.gpu_memory,
            resident=request.resident,
            device=request.device or _here(),
        )
    else:
        sizes = [
            None if text is None else parse_memory(text, name)
            for name, text in (("cpu_memory", request.cpu_memory), ("gpu_memory", request.gpu_memory))
        ]
        budgets = replace(budgets_of(profile, *sizes), resident=parse_resident(request.resident))
    if budgets.gpu_memory is not None and link is None and "device" not in profile.processors:
        raise UsageError(
            f"{profile.name} has no accelerator in its profile; name another with --hardware, or measure with offload "
            'probe, or give the pace of an emulated one: --device emulated --link "8GB/s"'
        )
    return Ask(
        spec=known.spec,
        extra_nbytes=known.unpack_nbytes,
        weights=known.weights,
        basis=known.basis,
        notes=known.notes,
        profile=profile,
        budgets=budgets,
        work=Workload(
            batch=1 if is_auto else int(request.batch),
            prompt_tokens=request.prompt_tokens,
            total_tokens=request.prompt_tokens + request.new_tokens,
        ),
        exact=request.exact,
        link_bytes_per_s=link,
        slots=request.slots,
        base_nbytes=process_nbytes(request.exact) + NEAR,
    )


def _saved(plan: Plan, request: PlanRequest) -> SavedPlan:
    kept = ("gpu_memory", "resident", "device", "link", "dtype", "weights", "exact", "slots")
    return SavedPlan(
        version=1,
        digest=digest(plan.ask.spec),
        options={name: getattr(request, name) for name in kept}
        | {"batch": plan.ask.work.batch, "cpu_memory": str(plan.ask.budgets.cpu_memory)},
        placement=plan.placement,
        work=plan.ask.work,
        predicted=predicted_of(plan.prediction, plan.ask.profile),
    )


def _here() -> str:
    """What this machine computes on; torch is asked only where the driver shows a card."""
    if not gpus():
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
