"""Several processes that ran the same cell, as one figure, and how far they lie apart.

A visit is one process, in which a cell runs a few times. Visits of one cell are minutes apart, with all other cells
between them, so that a slow spell of the machine meets one of them and not the other. What a cell takes is the median
of its visits, each of which is the median of its rounds: rounds of one process share its luck, and more of them say
little. Where two visits do not agree, a third decides; nobody asks whether it is nearer to what was predicted. By how
much one visit misses another is what no prediction can avoid, however good it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from statistics import mean, median

from offload.bench.ledger import Line

AGREE = 0.1  # how far two visits may lie apart that need no third one
Pair = tuple[Line, Line]
"""What was predicted of a cell, and what was measured."""


def by_cell(lines: Iterable[Line]) -> dict[str, list[Line]]:
    """Visits that ran, in the order of the ledger."""
    found: dict[str, list[Line]] = {}
    for line in lines:
        if "failed" not in line:
            found.setdefault(line["cell"], []).append(line)
    return found


def together(visits: Sequence[Line]) -> Line:
    """A cell's visits as one line; what rounds do not change is the first visit's, memory the largest.

    First tokens are those of a process's first prompt: one of each visit.
    """
    rounds = [seconds for visit in visits for seconds in visit["decodes_s_per_token"]]
    return {
        **visits[0],
        "decode_s_per_token": median(visit["decode_s_per_token"] for visit in visits),
        "decodes_s_per_token": rounds,
        "prefill_s": median(visit["prefill_s"] for visit in visits),
        "peak_rss_bytes": max(visit["peak_rss_bytes"] for visit in visits),
    }


def one_by_another(visits: Mapping[str, Sequence[Line]]) -> list[Pair]:
    """Each visit as the prediction of the next one of its cell: the errors of a model that knows this very run."""
    return [pair for of_cell in visits.values() for pair in pairwise(of_cell)]


def agree(visits: Sequence[Line]) -> bool:
    """Whether visits took about as long for a first token, and for a later one."""
    names = "prefill_s", "decode_s_per_token"
    return all(max(s) <= (1 + AGREE) * min(s) for n in names if (s := [visit[n] for visit in visits]))


def apart(visits: Sequence[Line]) -> float | None:
    """How far a cell's visits lie apart, relative; None of one alone."""
    seconds = [visit["decode_s_per_token"] for visit in visits]
    return (max(seconds) - min(seconds)) / mean(seconds) if len(seconds) > 1 else None


def rounds_apart(visits: Iterable[Line]) -> float | None:
    """How far the rounds of one process lie apart, relative, in the median of all visits."""
    each = [v["decodes_s_per_token"] for v in visits if len(v["decodes_s_per_token"]) > 1]
    return median((max(e) - min(e)) / mean(e) for e in each) if each else None
