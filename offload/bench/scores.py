"""How good predictions were: errors by kind of cell, beside those of simpler models, and what a plan's choice cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import ceil
from statistics import mean, median
from typing import Any

from offload.bench.cells import Cell
from offload.bench.ledger import Ledger, Line
from offload.bench.regret import regret
from offload.bench.visits import Pair, apart, by_cell, one_by_another, rounds_apart, together

NOISE = "the same cell in another process"


def scores(ledger: Ledger, cells: Sequence[Cell]) -> dict[str, Any]:
    """Everything that the page shows, from a ledger's lines."""
    visits = by_cell(ledger.all_of("measured"))
    measured = {name: together(lines) for name, lines in visits.items()}
    before, after, at_start = ledger.of("predicted"), ledger.of("calibrated"), ledger.all_of("at start")
    first_start = {line["cell"]: line for line in reversed(at_start)}

    def pairs(lines: Mapping[str, Line], wanted: Callable[[Cell], bool]) -> list[Pair]:
        return [
            (lines[c.name], measured[c.name])
            for c in cells
            if wanted(c) and c.name in measured and c.name in lines and "failed" not in lines[c.name]
        ]

    def starts(wanted: Callable[[Cell], bool]) -> list[Pair]:
        """What each process predicted for itself, with what it measured."""
        names = {c.name for c in cells if wanted(c)}
        own = {(m["cell"], m.get("visit", 0)): m for lines in visits.values() for m in lines}
        keys = [(line, (line["cell"], line.get("visit", 0))) for line in at_start if line["cell"] in names]
        return [(line, own[key]) for line, key in keys if key in own]

    def held(cell: Cell) -> bool:
        return cell.is_held_out

    def fitted(cell: Cell) -> bool:
        return not cell.is_held_out

    kinds = {
        "all cells, not calibrated": pairs(before, lambda _: True),
        "fitted cells, not calibrated": pairs(before, fitted),
        "held-out cells, not calibrated": pairs(before, held),
        "held-out cells, calibrated by the fitted ones": pairs(after, held),
        "all cells, at the start of each run": starts(lambda _: True),
        "fitted cells, at the start of each run": starts(fitted),
        "held-out cells, at the start of each run": starts(held),
        NOISE: one_by_another({c.name: visits[c.name] for c in cells if c.name in visits}),
        "held-out cells, sum of times": [(_as(p, "sum"), m) for p, m in pairs(before, held)],
        "held-out cells, slowest resource": [(_as(p, "max"), m) for p, m in pairs(before, held)],
        "all cells, sum of times": [(_as(p, "sum"), m) for p, m in pairs(before, lambda _: True)],
        "all cells, slowest resource": [(_as(p, "max"), m) for p, m in pairs(before, lambda _: True)],
    }
    return {
        "cells": len(cells),
        "held_out": sum(map(held, cells)),
        "measured": len(measured),
        "failed": {n: line["failed"] for n, line in ledger.of("measured").items() if "failed" in line}
        | {n: line["failed"] for n, line in before.items() if "failed" in line},
        "errors": {kind: errors(found) for kind, found in kinds.items() if found},
        "noise": rounds_apart(line for lines in visits.values() for line in lines),
        "regret": regret(ledger.all_of("alternative")),
        "drift": [
            drift(before[n], first_start[n], lines[0])
            for n, lines in visits.items()
            if _reads(lines[0]) and n in first_start
        ],
        "each": [
            _each(c, before, after, first_start, measured[c.name]) | {"apart": apart(visits[c.name])}
            for c in cells
            if c.name in measured
        ],
    }


def errors(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Relative errors of one kind of cells; `of_p95` is the 95th percentile (nearest rank)."""
    rate = [abs(m["decode_s_per_token"] / p["decode_s_per_token"] - 1) for p, m in pairs]
    first = [abs(p["prefill_s"] / m["prefill_s"] - 1) for p, m in pairs]
    found: dict[str, Any] = {
        "count": len(pairs),
        "tokens_per_s": spread(rate),
        "tokens_per_s_bias": mean(m["decode_s_per_token"] / p["decode_s_per_token"] - 1 for p, m in pairs),
        "first_token": spread(first),
        "first_token_bias": mean(p["prefill_s"] / m["prefill_s"] - 1 for p, m in pairs),
    }
    if all("interval" in p for p, _ in pairs):
        memory = [p["peak_rss_bytes"] / m["peak_rss_bytes"] for p, m in pairs]
        found |= {
            "binding_right": mean(p["binding"] == m["binding"] for p, m in pairs),
            "memory": [min(memory), median(memory), max(memory)],
            "interval_holds": mean(_holds(p["interval"], m["decode_s_per_token"]) for p, m in pairs),
            "prefill_interval_holds": mean(_holds(p["prefill_interval"], m["prefill_s"]) for p, m in pairs),
        }
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "mean": mean(ordered),
        "median": median(ordered),
        "p95": ordered[ceil(0.95 * len(ordered)) - 1],
        "max": ordered[-1],
    }


def drift(before: Line, at_start: Line, measured: Line) -> dict[str, Any]:
    """How far a token was from its predictions where the disk was busy, and how far the disk from its rate.

    Returns:
        disk: bytes per second as the profile has it, just before the run and just after.
        errors: of seconds of a token with each: the profile's rate, the rate before, and the mean of before and after.
        explains: whether those rates, and nothing else, account for most of the error that the profile's rate left.
    """
    seconds = measured["decode_s_per_token"]
    told = (before["decode_s_per_token"], at_start["decode_s_per_token"], measured["hindsight_s_per_token"])
    errors = [one / seconds - 1 for one in told]
    return {
        "cell": measured["cell"],
        "disk": [before.get("disk_bytes_per_s"), measured["disk_bytes_per_s"], measured["disk_after_bytes_per_s"]],
        "errors": errors,
        "explains": abs(errors[2]) < abs(errors[0]) / 2,
    }


def _reads(measured: Line) -> bool:
    return bool(measured.get("read_bytes_per_token")) and measured.get("disk_after_bytes_per_s") is not None


def _holds(interval: Sequence[float], value: float) -> bool:
    return interval[0] <= value <= interval[1]


def _as(line: Line, model: str) -> Line:
    """A simpler model's prediction: seconds only."""
    return dict(line[model])


def _each(
    cell: Cell, before: Mapping[str, Line], after: Mapping[str, Line], at_start: Mapping[str, Line], measured: Line
) -> dict[str, Any]:
    names = ("prefill_s", "decode_s_per_token", "peak_rss_bytes", "binding")

    def of(lines: Mapping[str, Line]) -> dict[str, Any] | None:
        line = lines.get(cell.name)
        return None if line is None or "failed" in line else {n: line[n] for n in names}

    return {
        "cell": cell.name,
        "held_out": cell.is_held_out,
        "predicted": of(before),
        "calibrated": of(after),
        "at_start": of(at_start),
        "measured": {n: measured[n] for n in names},
    }
