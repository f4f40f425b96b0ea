"""What a plan's choice cost: the chosen plan beside rejected ones and beside itself, all measured in turn.

The chosen plan runs twice in every turn, in processes of their own. What the second makes of the first is what the
comparison shows of plans that are the same: a regret that is no larger says nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import mean, median
from typing import Any, TypeVar

from offload.bench.ledger import Line

CHOSEN, CONTROL, OTHER = "chosen", "control", "other"
TURNS = 2
T = TypeVar("T")


def turns(candidates: Sequence[T]) -> list[tuple[int, T]]:
    """(turn, candidate): everyone once in every turn, every second turn backwards, so that a drift hits all alike."""
    return [(turn, c) for turn in range(TURNS) for c in (candidates if turn % 2 == 0 else reversed(candidates))]


def regret(lines: Iterable[Line]) -> dict[str, Any] | None:
    """How much longer a token took by the chosen plan than by the best that was measured; None where nothing was.

    Returns:
        cells: cell -> relative; the chosen plan's figure is the median of its own rounds and those of its control.
        controls: cell -> by how much the control differs from the chosen plan, which is the same.
        mean, max, control: of the cells; mean of the controls, None without any.
    """
    rounds: dict[str, dict[tuple[str, str], list[float]]] = {}
    for line in lines:
        if "failed" not in line:
            of_cell = rounds.setdefault(line["cell"], {})
            of_cell.setdefault((line["role"], line["plan"]), []).extend(line["decodes_s_per_token"])
    cells, controls = {}, {}
    for cell, found in rounds.items():
        chosen = [s for (role, _), each in found.items() if role == CHOSEN for s in each]
        control = [s for (role, _), each in found.items() if role == CONTROL for s in each]
        others = [median(each) for (role, _), each in found.items() if role == OTHER]
        if chosen and others:
            own = median(chosen + control)
            cells[cell] = own / min(own, *others) - 1
            if control:
                controls[cell] = abs(median(control) / median(chosen) - 1)
    if not cells:
        return None
    return {
        "cells": cells,
        "controls": controls,
        "mean": mean(cells.values()),
        "max": max(cells.values()),
        "control": mean(controls.values()) if controls else None,
    }
