"""A plan for a reader: where everything lives, what a step takes and why, what would help, what was rejected."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rich.console import Console
from rich.table import Table

from offload.commands.telling import note, say
from offload.plan import Plan, Variant, tiers_of, totals
from offload.plan.classes import Classes
from offload.planner.prediction import origin_of
from offload.units import format_bytes, format_count, format_moved, format_rate, format_seconds

SHOWN = 6  # rejected plans, best first; --json has them all
LANES = {
    "read": ("disk to memory", "the disk"),
    "upload": ("memory to device", "the link"),
    "compute": ("computing", "computing"),
}
BINDING = {"disk": "the disk", "link": "the link", "compute": "computing"}


def show(plan: Plan, console: Console) -> None:
    """Prints the plan."""
    ask, prediction = plan.ask, plan.prediction
    spec, profile = ask.spec, ask.profile
    weights = f"{format_bytes(spec.nbytes)} of weights" + (f" ({ask.weights})" if ask.weights != "none" else "")
    known = "measured" if profile.source == "measured" else "estimate"
    say(console, f"{format_count(spec.params)} parameters, {weights}; machine: {profile.name} ({known})", style="")
    notes = list(ask.notes)
    if ask.basis == "config" and not notes:
        notes.append("there are no headers; sizes follow from config.json")
    for text in (*notes, *(profile.notes if profile.source == "estimate" else ())):
        note(console, text)
    if plan.found.fits:
        console.print("It fits in memory: nothing streams, no offloading is needed.", highlight=False)
    for table in (_places(plan), _times(plan), _lanes(plan), _helps(plan), _rejected(plan)):
        if table is not None:
            console.print()
            console.print(table)
    console.print()
    say(console, f"Planned in {format_seconds(plan.planned_s)}; {origin_of(prediction)}.")


def _table(*names: str) -> Table:
    """The first column is text, the others are figures."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for k, name in enumerate(names):
        table.add_column(name, justify="left" if k == 0 else "right", no_wrap=k > 0)
    return table


def places(kinds: Classes, budgets: Mapping[str, int | None]) -> Table:
    """Bytes by class and tier, their sums, and what each tier may give."""
    tiers = tiers_of(kinds)
    table = _table("bytes", *tiers)
    for kind, row in kinds.items():
        table.add_row(kind, *(format_bytes(row[t]) if row.get(t) else "" for t in tiers))
    sums = totals(kinds)
    table.add_row("total", *(format_bytes(sums[t]) for t in tiers), style="bold")
    most = [format_bytes(size) if (size := budgets.get(t)) else "" for t in tiers]
    if any(most):
        table.add_row("of", *most, style="dim")
    return table


def _places(plan: Plan) -> Table:
    budgets = plan.ask.budgets
    return places(plan.classes(), {"host": budgets.cpu_memory, "device": budgets.gpu_memory})


def _times(plan: Plan) -> Table:
    prediction, work = plan.prediction, plan.ask.work
    batch = work.batch > 1
    table = Table(box=None, pad_edge=False, show_header=False)
    for k in range(4):
        table.add_column(justify="right" if k == 1 else "left", no_wrap=k < 3)
    prompts = f"{work.batch} prompts of" if batch else "prompt of"
    table.add_row(
        "first token",
        format_seconds(prediction.prefill_s),
        _range(prediction.prefill_interval),
        f"{prompts} {work.prompt_tokens} tokens",
    )
    rate = f"{_figures(prediction.tokens_per_s)} tokens/s" + (f" of {work.batch} sequences" if batch else "")
    step = prediction.decode_s_per_token
    table.add_row("each step" if batch else "each token", format_seconds(step), _range(prediction.interval), rate)
    bound = prediction.bound_s_per_token
    table.add_row("bound", format_seconds(bound), f"{bound / step:.0%} reached", f"{BINDING[prediction.binding]} binds")
    return table


def _lanes(plan: Plan) -> Table:
    table = _table("a step", "bytes", "at", "takes", "busy")
    for lane, found in plan.lanes().items():
        nbytes, seconds = found["bytes"], found["seconds"]
        moved = (format_moved(nbytes), format_rate(nbytes / seconds)) if nbytes else ("", "")
        table.add_row(LANES[lane][0], *moved, format_seconds(seconds), f"{found['busy']:.0%}")
    return table


def _helps(plan: Plan) -> Table | None:
    """What the user asked about, and what more of each memory or rate would buy."""
    names = {variant.label for variant in plan.asked}
    return _variants(plan, [*plan.asked, *(v for v in plan.buys if v.label not in names)])


def _variants(plan: Plan, variants: Iterable[Variant]) -> Table | None:
    table = _table("what if", "a step", "tokens/s", "times as fast")
    for variant in variants:
        seconds, rate = variant.decode_s_per_token, variant.tokens_per_s
        if seconds is None or rate is None:
            table.add_row(variant.label, "does not fit", "", "")
        else:
            times = plan.prediction.decode_s_per_token / seconds
            table.add_row(variant.label, format_seconds(seconds), _figures(rate), f"{times:.2f}")
    return table if table.row_count else None


def _rejected(plan: Plan) -> Table | None:
    if not plan.found.rejected:
        return None
    table = _table("rejected", "a step", "slower by")
    rows: dict[tuple[str, ...], None] = {}  # what reads the same once rounded is one
    for other in plan.found.rejected:
        seconds = other.decode.seconds
        slower = seconds / plan.prediction.decode_s_per_token - 1
        rows[other.label, format_seconds(seconds), f"{max(slower, 0):.1%}"] = None
    for row in list(rows)[:SHOWN]:
        table.add_row(*row)
    table.add_row(f"chosen: {plan.found.best.label}", format_seconds(plan.prediction.decode_s_per_token), "")
    return table


def _range(interval: tuple[float, float]) -> str:
    return f"{format_seconds(interval[0])} to {format_seconds(interval[1])}"


def _figures(rate: float) -> str:
    """Three figures at least, never a power of ten."""
    return f"{rate:,.0f}" if rate >= 99.95 else f"{rate:#.3g}"
