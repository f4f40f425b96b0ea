"""What happened when: spans and marks in bounded rings; totals by lane, stalls by cause; Chrome trace export."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

SPANS = 20_000
MARKS = 5_000
LANES = ("read", "upload", "compute", "stall")


class Span(NamedTuple):
    """One thing that a lane did, in seconds of the process's monotonic clock."""

    lane: str
    name: str
    start: float
    end: float
    nbytes: int


class Mark(NamedTuple):
    """A moment with a name, and bytes in use on each tier then: "token 3", {"cpu_memory": 1 << 30}."""

    name: str
    time: float
    memory: dict[str, int]


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums since the timeline was made or reset.

    Attributes:
        busy_s: lane -> seconds in which it had work, summed over spans.
        nbytes: lane -> bytes it moved.
        stall_s: what was waited for -> seconds; `compute:read` is the model waiting for the disk,
            `upload:read` the lane that uploads.
    """

    busy_s: dict[str, float]
    nbytes: dict[str, int]
    stall_s: dict[str, float]


class Timeline:
    """Safe for threads. Keeps the last `capacity` spans and the last marks; totals count all."""

    def __init__(self, capacity: int = SPANS) -> None:
        self.spans: deque[Span] = deque(maxlen=capacity)
        self.marks: deque[Mark] = deque(maxlen=MARKS)
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Forgets spans, marks and totals."""
        with self._lock:
            self.spans.clear()
            self.marks.clear()
            self._busy: dict[str, float] = defaultdict(float)
            self._bytes: dict[str, int] = defaultdict(int)
            self._stall: dict[str, float] = defaultdict(float)

    def add(self, lane: str, name: str, start: float, end: float, nbytes: int = 0) -> None:
        """Records a span of work."""
        with self._lock:
            self.spans.append(Span(lane, name, start, end, nbytes))
            self._busy[lane] += end - start
            self._bytes[lane] += nbytes

    def stall(self, cause: str, name: str, start: float, end: float) -> None:
        """Records time that somebody waited."""
        with self._lock:
            self.spans.append(Span("stall", f"{cause} {name}", start, end, 0))
            self._stall[cause] += end - start

    def mark(self, name: str, memory: dict[str, int]) -> None:
        """Records that something happened just now, with the bytes in use on each tier."""
        with self._lock:
            self.marks.append(Mark(name, now(), memory))

    def totals(self) -> Totals:
        with self._lock:
            return Totals(dict(self._busy), dict(self._bytes), dict(self._stall))

    def write_chrome_trace(self, path: str | os.PathLike[str]) -> None:
        """A JSON file for chrome://tracing or Perfetto: a row per lane, microseconds, bytes as arguments.

        Reads of one lane overlap, so they are spread over as many rows as were in flight at once. A mark is an instant
        and a value of the counter "memory".
        """
        with self._lock:
            spans, marks = list(self.spans), list(self.marks)
        events: list[dict[str, object]] = []
        lanes = list(dict.fromkeys([*LANES, *(span.lane for span in spans)]))
        labels: dict[int, str] = {}
        for span, row in rows(spans):
            thread = lanes.index(span.lane) * 100 + row
            labels[thread] = span.lane if row == 0 else f"{span.lane} {row + 1}"
            base = {"name": span.name, "cat": span.lane, "ph": "X", "pid": 1, "tid": thread}
            events.append(
                base | {"ts": span.start * 1e6, "dur": (span.end - span.start) * 1e6, "args": {"bytes": span.nbytes}}
            )
        for mark in marks:
            at = {"pid": 1, "tid": 0, "ts": mark.time * 1e6}
            events.append(at | {"name": mark.name, "cat": "mark", "ph": "i", "s": "g"})
            events.append(at | {"name": "memory", "cat": "memory", "ph": "C", "args": mark.memory})
        for thread, label in sorted(labels.items()):
            events.append({"name": "thread_name", "ph": "M", "pid": 1, "tid": thread, "args": {"name": label}})
        text = json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})
        target = Path(path)
        part = target.with_name(target.name + ".part")
        try:
            part.write_text(text)
            part.replace(target)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def rows(spans: Sequence[Span]) -> list[tuple[Span, int]]:
    """Spans by their start, each with the first row of its lane, from 0, that is free by then."""
    ends: dict[str, list[float]] = defaultdict(list)
    found = []
    for span in sorted(spans, key=lambda s: s.start):
        lane = ends[span.lane]
        row = next((k for k, end in enumerate(lane) if end <= span.start), len(lane))
        lane[row : row + 1] = [span.end]
        found.append((span, row))
    return found


def now() -> float:
    """Seconds of the clock that spans use."""
    return time.perf_counter()
