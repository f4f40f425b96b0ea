"""`offload probe`: measures the machine, keeps the profile, and shows it as one table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from offload.api import probe
from offload.bench.rehearsal import rehearse
from offload.checkpoint import find
from offload.commands.telling import say
from offload.errors import UsageError
from offload.profile import OpTable, Profile, dump, forget, load_profile, own_profile
from offload.units import format_bytes, format_rate, format_seconds

Row = tuple[str, str, str, str]


def execute(
    model: str | None,
    effort: str | None,
    offload_dir: str | None,
    weights: str | None,
    out: str | None,
    *,
    as_json: bool,
) -> int:
    """Measures and shows; returns the exit status. Errors are raised."""
    transformers.utils.logging.set_verbosity_error()
    console = Console(stderr=True, quiet=as_json)
    columns = SpinnerColumn(), TextColumn("measuring: {task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=as_json) as bar:
        task = bar.add_task("", total=None)

        def show(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        known = effort is None and own_profile(find(model) if model is not None else None) is not None
        profile = probe(model, effort=effort, offload_dir=offload_dir, weights=weights, progress=show)
        if model is not None and not known:
            rehearse(model, lambda what: show(what, 1, 1))
            profile = load_profile(find(model)) or profile
    if out is not None:
        try:
            Path(out).write_text(dump(profile))
        except OSError as error:
            raise UsageError(f"-o {out} cannot be written: {error.strerror}") from error
    if as_json:
        print(json.dumps(asdict(profile)))
        return 0
    console.print(table(profile), highlight=False)
    for text in profile.notes:
        say(console, f"note: {text}", "yellow" if text.startswith("not quiet") else "dim")
    drift = f"key figures moved by {profile.drift:.1%} while it was measured"
    say(console, f"{profile.describe()}; {profile.versions.get('effort', '')}, {profile.date}; {drift}")
    return 0


def forget_runs(model: str | None) -> int:
    """`offload probe --forget`: removes what runs have taught; returns the exit status."""
    count = forget(find(model) if model is not None else None)
    say(Console(stderr=True), f"forgot what runs have taught of {count} profile{'s' * (count != 1)}", style="")
    return 0


def table(profile: Profile) -> Table:
    """One row for each figure that was measured."""
    found = Table(title=None, box=None, pad_edge=False)
    for column in ("what", "where", "figure", "spread"):
        found.add_column(column, justify="right" if column in ("figure", "spread") else "left")
    for row in (*_rates(profile), *_ops(profile), *_rest(profile)):
        found.add_row(*row)
    return found


def _rates(profile: Profile) -> Iterator[Row]:
    for name, processor in profile.processors.items():
        for word, rates in (("read", processor.memory), ("copy", processor.copy)):
            for r in rates:
                plural = "s" * (r.threads > 1)
                yield (
                    f"memory {word}",
                    f"{name}, {r.threads} thread{plural}",
                    format_rate(r.bytes_per_s),
                    _part(r.spread),
                )
        for dtype, flops in processor.flops.items():
            yield "large products", f"{name}, {dtype}", f"{flops / 1e9:,.0f} GFLOP/s", ""
    for name, lane in profile.lanes.items():
        for c in lane.rates:
            where = f"{format_bytes(c.nbytes)} x {c.threads}"
            yield name, where, format_rate(c.bytes_per_s), _part(c.spread)
        if lane.sustained_bytes_per_s is not None:
            yield name, "sustained", format_rate(lane.sustained_bytes_per_s), ""


def _ops(profile: Profile) -> Iterator[Row]:
    for op in profile.ops:
        shape = " x ".join(map(str, op.shape))
        where = f"{op.implementation} on {op.processor}, {op.format} {shape}".rstrip()
        for anchor in (op.curve.anchors[0], op.curve.anchors[-1])[: len(op.curve.anchors)]:
            amount = format_bytes(anchor.x) if op.over == "bytes" else f"{anchor.x:,.0f} {op.over}"
            yield f"{op.op}, {amount}", where, _figure(op, anchor.x, anchor.seconds), _part(anchor.spread)


def _figure(op: OpTable, amount: float, seconds: float) -> str:
    rate = ""
    if op.over == "bytes":
        rate = f", {format_rate(amount / seconds)}"
    elif op.over == "params":
        rate = f", {amount / seconds / 1e9:.2f} G/s"
    return format_seconds(seconds) + rate


def _rest(profile: Profile) -> Iterator[Row]:
    for name, seconds in profile.costs.items():
        yield "software", name, f"{seconds * 1e6:,.1f} us", ""
    for family, residual in profile.learned.families.items():
        what = f"as predicted x {residual.factor:.2f}" if family not in ("prefill", "decode") else ""
        runs = f"{residual.runs:.0f} run" + "s" * (residual.runs != 1)
        yield "learned", f"{family}, {runs}", what, _part(residual.deviation(0.0))
    for who, others in profile.interference.items():
        for other, kept in others.items():
            yield f"{who} keeps", f"beside {other}", f"{kept:.0%}", ""


def _part(spread: float) -> str:
    return f"{spread:.1%}"
