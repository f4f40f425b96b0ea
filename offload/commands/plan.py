"""`offload plan`: what a run would take and why, without making it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from offload.budgets import resolve
from offload.checkpoint import find
from offload.checkpoint.numbers import numbers
from offload.errors import UsageError
from offload.hardware import gpus
from offload.plan import (
    Ask,
    Plan,
    SavedPlan,
    best_batch,
    budgets_of,
    digest,
    machine,
    make,
    process_nbytes,
    save,
    tiers_of,
)
from offload.planner.whatif import parse_change
from offload.specs import Workload, check_length
from offload.units import format_bytes, format_rate, format_seconds, parse_bytes, parse_rate

SHOWN = 6  # rejected plans, best first; --json has them all


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """The options of `offload plan`; see its help."""

    model: str
    cpu_memory: str | None = None
    gpu_memory: str | None = None
    resident: str | None = None
    device: str | None = None
    link: str | None = None
    dtype: str = "auto"
    prompt_tokens: int = 512
    new_tokens: int = 128
    batch: str = "1"
    weights: str | None = None
    exact: bool = False
    slots: int | None = None
    hardware: str | None = None
    what_if: tuple[str, ...] = ()
    output: str | None = None
    json: bool = False


def execute(request: PlanRequest) -> int:
    """Plans and prints; returns the exit status. Errors are raised."""
    plan = plan_of(request)
    if request.output is not None:
        save(_saved(plan, request), request.output)
    if request.json:
        print(json.dumps({"model": request.model, **plan.as_dict()}))
    else:
        show(plan, Console())
    return 0


def plan_of(request: PlanRequest) -> Plan:
    """The plan of a request.

    Raises:
        UsageError, CheckpointError, BudgetError: see offload.errors.
    """
    changes = [parse_change(text) for text in request.what_if]
    ask = ask_of(request)
    return make(best_batch(ask) if request.batch == "auto" else ask, changes)


def ask_of(request: PlanRequest) -> Ask:
    """The model, the machine and the work of a request; one sequence where the batch is still to be chosen.

    Raises:
        UsageError, CheckpointError: see offload.errors.
    """
    is_auto = request.batch == "auto"
    if not is_auto and (not request.batch.isdecimal() or not 1 <= int(request.batch) <= 100_000):
        raise UsageError(f'--batch {request.batch}: a number of sequences from 1, or "auto"')
    directory = find(request.model)
    profile = machine(request.hardware, directory)
    known = numbers(directory, dtype=request.dtype, weights=request.weights, exact=request.exact)
    check_length(request.prompt_tokens, request.new_tokens, known.spec.max_tokens)
    link = parse_rate(request.link, "link") if request.link is not None else None
    if request.hardware is None or request.device is not None:
        budgets = resolve(
            cpu_memory=request.cpu_memory,
            gpu_memory=request.gpu_memory,
            resident=request.resident,
            device=request.device or _here(),
        )
    else:
        sizes = [
            None if text is None else parse_bytes(text, name)
            for name, text in (("cpu_memory", request.cpu_memory), ("gpu_memory", request.gpu_memory))
        ]
        budgets = budgets_of(profile, *sizes)
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
        base_nbytes=process_nbytes(request.exact),
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
        predicted=plan.prediction.as_dict(),
    )


def _here() -> str:
    """What this machine computes on; torch is asked only where the driver shows a card."""
    if not gpus():
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def show(plan: Plan, console: Console) -> None:
    """The plan for a reader."""
    ask, found, prediction = plan.ask, plan.found, plan.prediction
    spec, profile = ask.spec, ask.profile
    console.print(
        f"{spec.params / 1e9:.2f} B parameters, {format_bytes(spec.nbytes)} of weights"
        + (f" ({ask.weights})" if ask.weights != "none" else "")
        + f"; {profile.name} ({'measured' if profile.source == 'measured' else 'estimate'})",
        highlight=False,
    )
    if ask.basis == "config":
        console.print("note: there are no headers; sizes follow from config.json", style="yellow", highlight=False)
    for note in profile.notes if profile.source == "estimate" else ():
        console.print(f"note: {note}", style="yellow", highlight=False)
    if found.fits:
        console.print("It fits in memory: nothing streams, no offloading is needed.", highlight=False)
    kinds = plan.classes()
    tiers = tiers_of(kinds)
    table = Table(box=None, pad_edge=False)
    table.add_column("bytes")
    for tier in tiers:
        table.add_column(tier, justify="right")
    for kind, row in kinds.items():
        if any(row.values()):
            table.add_row(kind, *(format_bytes(row[t]) if row.get(t) else "" for t in tiers))
    console.print(table)
    for line in _figures(plan):
        console.print(line, highlight=False)
    rows = [(v.label, v.decode_s_per_token, v.tokens_per_s) for v in (*plan.asked, *plan.buys)]
    if rows or found.rejected:
        console.print()
        console.print(_compared(plan, rows))
    origin = "" if prediction.origin == "measured" else " Estimate: not all of it was measured."
    console.print(f"Planned in {format_seconds(plan.planned_s)}.{origin}", style="dim", highlight=False)


def _figures(plan: Plan) -> list[str]:
    prediction, ask = plan.prediction, plan.ask
    low, high = prediction.interval
    each = " for each sequence" if ask.work.batch > 1 else ""
    lines = [
        "",
        f"first token after  {format_seconds(prediction.prefill_s)}   (prompts: {ask.work.batch} x "
        f"{ask.work.prompt_tokens} tokens)",
        f"then a token{each}  {format_seconds(prediction.decode_s_per_token)}   "
        f"({format_seconds(low)} to {format_seconds(high)}), {prediction.tokens_per_s:.2f} tokens/s",
        f"bound              {format_seconds(prediction.bound_s_per_token)}   ({prediction.binding})",
    ]
    moved: list[tuple[str, float, float]] = [
        ("read", prediction.read_bytes_per_token, prediction.decode.bound.disk_s),
        ("uploaded", prediction.upload_bytes_per_token, prediction.decode.bound.link_s),
    ]
    for verb, nbytes, seconds in moved:
        if nbytes:
            lines.append(f"{verb:18s} {nbytes / 1e9:.2f} GB a token at {format_rate(nbytes / seconds)}")
    device = f", device {format_bytes(prediction.device_peak_bytes)}" if prediction.device_peak_bytes else ""
    lines.append(f"peak memory        {format_bytes(prediction.peak_rss_bytes)}{device}")
    return lines


def _compared(plan: Plan, rows: list[tuple[str, float | None, float | None]]) -> Table:
    """What else there is, beside the plan."""
    now = plan.prediction.decode_s_per_token
    table = Table(box=None, pad_edge=False)
    for name in ("instead", "a token", "times as fast"):
        table.add_column(name, justify="left" if name == "instead" else "right")
    others: list[tuple[str, float | None, Any]] = [
        (f"plan: {c.label}", c.decode.seconds, None) for c in plan.found.rejected[:SHOWN]
    ]
    for label, seconds, _ in [*others, *rows]:
        if seconds is None:
            table.add_row(label, "does not fit", "")
        else:
            table.add_row(label, format_seconds(seconds), f"{now / seconds:.2f}")
    return table
