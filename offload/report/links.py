"""How much of the disk and the link was used, moment by moment, against the rate each was measured at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from offload.report.axes import amounts_axis, scale, seconds_axis
from offload.report.recorded import Trace, number
from offload.report.svg import NARROW, Frame, Svg, ticks
from offload.runtime.timeline import Span
from offload.units import format_bytes, format_rate

LINKS = {
    "read": ("Read from disk", "disk_bytes_per_s"),
    "upload": ("Uploaded to the device", "link_bytes_per_s"),
    "download": ("Downloaded from the device", "link_bytes_per_s"),
    "write": ("Written to disk", ""),
}
BINS = 160
HEIGHT = 110


def links(run: Mapping[str, Any], trace: Trace, frame: Frame) -> list[str]:
    """A picture for each lane that moved bytes."""
    # Lanes run ahead for a pass that never comes: what they move after the last token served nobody.
    end = trace.marks[-1].time if len(trace.marks) > 1 else trace.end
    found = []
    for lane, (title, rate) in LINKS.items():
        spans = [s for s in trace.spans if s.lane == lane and s.nbytes and s.start < end]
        if spans:
            found.append(_link(title, lane, spans, (trace.start, end), number(run, rate), frame))
    return found


def rates(spans: Iterable[Span], low: float, high: float, bins: int = BINS) -> list[float]:
    """Bytes per second in equal parts of a stretch of time; a span's bytes are spread evenly over its own time."""
    width = max(high - low, 1e-9) / bins
    found = [0.0] * bins
    for span in spans:
        length = max(span.end - span.start, 1e-9)
        first = min(max(int((span.start - low) / width), 0), bins - 1)
        last = min(max(int((span.end - low) / width), 0), bins - 1)
        for k in range(first, last + 1):
            begin, end = low + k * width, low + (k + 1) * width
            found[k] += span.nbytes * max(0.0, min(end, span.start + length) - max(begin, span.start)) / length
    return [nbytes / width for nbytes in found]


def _link(
    title: str, lane: str, spans: list[Span], window: tuple[float, float], limit: float | None, frame: Frame
) -> str:
    low, high = window
    bins = frame.count(BINS)
    values = rates(spans, low, high, bins)
    most = max(*values, limit or 0.0, 1.0) * 1.08
    top, bottom = 24.0, 24.0 + HEIGHT
    svg = Svg(frame, bottom + 24, f"{title} over time")
    average = sum(values) / bins
    said = f"{title}: {format_rate(average)}"
    said += "" if frame is NARROW else f" on average, {format_bytes(average * (high - low))} in all"
    if limit:
        said += f", {average / limit:.0%} of {format_rate(limit)}"
    svg.text(0, 14, said, "title")

    def y(value: float) -> float:
        return bottom - value / most * HEIGHT

    amounts_axis(svg, frame, ticks(most, 4), y, format_rate)
    seconds_axis(svg, frame, low, high, top, bottom)
    x, width = scale(frame, low, high), (high - low) / bins
    line = [(x(low + (k + side) * width), y(value)) for k, value in enumerate(values) for side in (0, 1)]
    svg.path([(frame.left, bottom), *line, (frame.right, bottom)], f"area {lane}")
    if limit:
        svg.line(frame.left, y(limit), frame.right, y(limit), "limit")
    return str(svg)
