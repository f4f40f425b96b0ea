"""What happened when: spans by lane, in a bounded ring; totals by lane and stalls by cause; Chrome trace export."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import defaultdict, deque
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

SPANS = 20_000
LANES = ("read", "upload", "compute", "stall")


class Span(NamedTuple):
    """One thing that a lane did, in seconds of the process's monotonic clock."""

    lane: str
    name: str
    start: float
    end: float
    nbytes: int


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums since the timeline was made or reset.

    Attributes:
        busy_s: lane -> seconds in which it had work, summed over spans.
        nbytes: lane -> bytes it moved.
        stall_s: what was waited for -> seconds; `compute:read` is the model waiting for the disk.
    """

    busy_s: dict[str, float]
    nbytes: dict[str, int]
    stall_s: dict[str, float]


class Timeline:
    """Safe for threads. Keeps the last `capacity` spans; totals count all."""

    def __init__(self, capacity: int = SPANS) -> None:
        self.spans: deque[Span] = deque(maxlen=capacity)
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Forgets spans and totals."""
        with self._lock:
            self.spans.clear()
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

    def totals(self) -> Totals:
        with self._lock:
            return Totals(dict(self._busy), dict(self._bytes), dict(self._stall))

    def write_chrome_trace(self, path: str | os.PathLike[str]) -> None:
        """A JSON file for chrome://tracing or Perfetto: a row per lane, microseconds, bytes as arguments.

        Reads of one lane overlap, so they are spread over as many rows as were in flight at once.
        """
        with self._lock:
            spans = sorted(self.spans, key=lambda s: s.start)
        events: list[dict[str, object]] = []
        rows: dict[str, list[float]] = {lane: [] for lane in LANES}
        for span in spans:
            ends = rows.setdefault(span.lane, [])
            row = next((k for k, end in enumerate(ends) if end <= span.start), len(ends))
            ends[row : row + 1] = [span.end]
            thread = list(rows).index(span.lane) * 100 + row
            base = {"name": span.name, "cat": span.lane, "ph": "X", "pid": 1, "tid": thread}
            events.append(
                base | {"ts": span.start * 1e6, "dur": (span.end - span.start) * 1e6, "args": {"bytes": span.nbytes}}
            )
        for k, (lane, ends) in enumerate(rows.items()):
            for row in range(len(ends)):
                label = lane if row == 0 else f"{lane} {row + 1}"
                name = {"name": "thread_name", "ph": "M", "pid": 1, "tid": k * 100 + row, "args": {"name": label}}
                events.append(name)
        text = json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})
        target = Path(path)
        part = target.with_name(target.name + ".part")
        part.write_text(text)
        part.replace(target)


def now() -> float:
    """Seconds of the clock that spans use."""
    return time.perf_counter()
