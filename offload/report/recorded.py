"""What a run left behind: the object that `offload run --json` printed, and the spans and marks of its trace."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offload.errors import UsageError
from offload.runtime.timeline import SPANS, Mark, Span

NEEDED = ("model", "budgets", "prefill_s", "bound")


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Spans and marks of one generation, in seconds since its first mark (since the first span without marks).

    Attributes:
        spans: by their start; those that had ended before the generation began are left out.
        marks: by time: "start", then "token 1" and so on.
        is_cut: the first spans were dropped, since a timeline keeps the latest only.
    """

    spans: tuple[Span, ...]
    marks: tuple[Mark, ...] = ()
    is_cut: bool = False

    @property
    def start(self) -> float:
        """Where the record begins: 0, or later where it is cut."""
        return max(0.0, min((s.start for s in self.spans), default=0.0)) if self.is_cut else 0.0

    @property
    def end(self) -> float:
        return max([*(s.end for s in self.spans), *(m.time for m in self.marks)], default=0.0)


def read_run(path: str) -> dict[str, Any]:
    """The object of one run.

    Raises:
        UsageError: the file cannot be read, or is not what `offload run --json` prints.
    """
    found = _object(path)
    missing = [name for name in NEEDED if name not in found]
    if missing:
        raise UsageError(
            f"{path} is not what `offload run --json` prints: it has no {', '.join(missing)}. "
            f"Make one with: offload run MODEL --prompt ... --json > {path}"
        )
    return found


def read_trace(path: str) -> Trace:
    """The spans and marks that `offload run --trace` wrote.

    Raises:
        UsageError: the file cannot be read, or is no trace of ours.
    """
    events = _object(path).get("traceEvents")
    if not isinstance(events, list):
        raise UsageError(f"{path} is no trace: it has no traceEvents. Make one with: offload run ... --trace {path}")
    try:
        return trace(events)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{path}: an event that `offload run --trace` does not write: {error!r}") from error


def trace(events: list[dict[str, Any]]) -> Trace:
    """From Chrome-trace events; of several generations in one process, the last."""
    spans, names, memory = [], [], {}
    for event in events:
        kind = event["ph"]
        if kind == "X":
            start, length = _seconds(event["ts"]), _seconds(event["dur"])
            nbytes = int(event.get("args", {}).get("bytes", 0))
            spans.append(Span(str(event["cat"]), str(event["name"]), start, start + length, nbytes))
        elif kind == "i":
            names.append((str(event["name"]), _seconds(event["ts"])))
        elif kind == "C":
            memory[_seconds(event["ts"])] = {str(k): int(v) for k, v in event["args"].items()}
    names.sort(key=lambda n: n[1])
    last = max((k for k, (name, _) in enumerate(names) if name == "start"), default=0)
    names = names[last:]
    zero = names[0][1] if names else min((s.start for s in spans), default=0.0)
    return Trace(
        spans=tuple(
            s._replace(start=s.start - zero, end=s.end - zero)
            for s in sorted(spans, key=lambda s: s.start)
            if s.end >= zero
        ),
        marks=tuple(Mark(name, at - zero, memory.get(at, {})) for name, at in names),
        is_cut=len(spans) >= SPANS,
    )


def number(found: Mapping[str, Any], *path: str) -> float | None:
    """The number under these keys; None where there is none, or none that can be drawn."""
    value: Any = found
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _seconds(microseconds: Any) -> float:
    value = float(microseconds) / 1e6
    if not math.isfinite(value):
        raise ValueError(f"a time of {microseconds}")
    return value


def _object(path: str) -> dict[str, Any]:
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise UsageError(f"{path} holds no JSON object")
    return found
