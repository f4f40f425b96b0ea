"""The benchmark of predictions as a page of Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from offload.bench.scores import NOISE


def page(found: dict[str, Any]) -> str:
    """Tables of what `scores` found."""
    lines = [
        "# Predictions beside what was measured",
        "",
        f"{found['measured']} of {found['cells']} cells measured, {found['held_out']} of them held out: nothing "
        "that was measured of those, nor of a model that is held out as a whole, has taught what they are judged by. "
        "Every prediction was on the disk before its cell was measured.",
    ]
    lines += [
        "Every cell ran in several processes, minutes apart, with all other cells between them: what it took is the "
        "median of its processes, two of them or, where two lie apart, three; each is the median of its rounds. What a "
        "run predicted at its start is held to the rounds of that process.",
        f'"{NOISE}" takes one process\'s figures for a prediction of the next: no prediction of a process can be much '
        "better, whatever it knows of the model and the machine.",
    ]
    if found["noise"] is not None:
        lines.append(f"The rounds of one process lie {found['noise']:.1%} apart in the median.")
    header = ["", "cells", "tokens/s: mean", "p95", "worst", "bias", "first token: mean", "p95", "bias"]
    header += ["memory, predicted/measured", "bottleneck right", "in its interval", "first token in its"]
    lines += ["", *_table(header, [_row(kind, e) for kind, e in found["errors"].items()])]
    if found["regret"] is not None:
        regret = found["regret"]
        lines += [
            "",
            f"By the chosen plans tokens took {regret['mean']:.1%} longer than by the best of the alternatives "
            f"that were measured, at worst {regret['max']:.1%} ({len(regret['cells'])} cells).",
        ]
        if regret["control"] is not None:
            lines.append(
                f"The chosen plans, measured twice in the same turns, differ from themselves by "
                f"{regret['control']:.1%}: a regret that is no larger is none that was seen."
            )
    if found["failed"]:
        lines += ["", "Not measured:", "", *(f"- {cell}: {why}" for cell, why in found["failed"].items())]
    if found["drift"]:
        lines += [
            "",
            "Where weights stream, a prediction is the model's times the disk's rate of the moment. `offload run` "
            "measures that rate before it predicts; what was predicted before any cell ran rests on the profile's. "
            "Errors of a token's time with the profile's rate, with the one just before the run, and (no prediction "
            "any more) with the mean of before and after:",
        ]
        header = ["cell", "disk: profile, GB/s", "before", "after"]
        header += ["error: profile", "before", "mean", "the disk explains"]
        lines += ["", *_table(header, [_drift(one) for one in found["drift"]])]
    header = ["cell", "held out", "first token: predicted, s", "calibrated", "at start", "measured"]
    header += ["a token: predicted, s", "calibrated", "at start", "measured", "processes apart"]
    lines += ["", *_table(header, [_cell(one) for one in found["each"]])]
    return "\n".join(lines) + "\n"


def _row(kind: str, e: dict[str, Any]) -> list[str]:
    rate, first = e["tokens_per_s"], e["first_token"]
    row = [kind, str(e["count"]), *(f"{rate[n]:.1%}" for n in ("mean", "p95", "max")), f"{e['tokens_per_s_bias']:+.1%}"]
    row += [f"{first['mean']:.1%}", f"{first['p95']:.1%}", f"{e['first_token_bias']:+.1%}"]
    if "memory" in e:
        low, middle, high = e["memory"]
        row += [f"{low:.3f} to {high:.3f}, median {middle:.3f}", f"{e['binding_right']:.0%}"]
        row += [f"{e['interval_holds']:.0%}", f"{e['prefill_interval_holds']:.0%}"]
    else:
        row += [""] * 4
    return row


def _cell(one: dict[str, Any]) -> list[str]:
    row = [one["cell"], "yes" if one["held_out"] else ""]
    for name in ("prefill_s", "decode_s_per_token"):
        for kind in ("predicted", "calibrated", "at_start", "measured"):
            row.append(f"{one[kind][name]:.4f}" if one[kind] else "")
    return [*row, "" if one["apart"] is None else f"{one['apart']:.1%}"]


def _drift(one: dict[str, Any]) -> list[str]:
    rates = [f"{rate / 1e9:.2f}" if rate else "" for rate in one["disk"]]
    return [one["cell"], *rates, *(f"{e:+.1%}" for e in one["errors"]), "yes" if one["explains"] else ""]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]
