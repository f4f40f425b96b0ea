"""Lanes over time, a row for each thing in flight at once; the model's waits in red, by cause."""

from __future__ import annotations

from offload.report.axes import scale, seconds_axis
from offload.report.recorded import Trace
from offload.report.svg import Frame, Svg, clip
from offload.runtime.timeline import LANES, Span, rows
from offload.units import format_bytes, format_rate, format_seconds

STEPS = 3
ROW = 18

Window = tuple[str, float, float]


def windows(trace: Trace) -> list[Window]:
    """(title, from, to): the first pass and the last few steps, or everything where no marks say when they were."""
    if len(trace.marks) < 2:
        return [("All that the trace holds", trace.start, trace.end)] if trace.spans else []
    found = [("First pass", trace.marks[0].time, trace.marks[1].time)]
    steps = min(STEPS, len(trace.marks) - 2)
    if steps:
        title = "Last step" if steps == 1 else f"Last {steps} steps"
        found.append((title, trace.marks[-1 - steps].time, trace.marks[-1].time))
    return found


def gantt(trace: Trace, window: Window, frame: Frame) -> tuple[str, str]:
    """(SVG, note): what ran between two times. The note says what is not drawn; empty where all is."""
    title, low, high = window
    inside = [s for s in trace.spans if s.end > low and s.start < high]
    drawn = sorted(inside, key=lambda s: (s.lane == "stall", s.end - s.start), reverse=True)[: frame.spans]
    notes = []
    if len(drawn) < len(inside):
        notes.append(f"the {len(drawn):,} longest of {len(inside):,} spans are drawn")
    if trace.start > low:
        notes.append("the trace keeps the latest spans only: the beginning of this time is not in it")
    laid = rows([s._replace(lane=_row_label(s)) for s in drawn])
    heights: dict[str, int] = {}
    for span, row in laid:
        heights[span.lane] = max(heights.get(span.lane, 0), row + 1)
    tops: dict[str, float] = {}
    bottom = 24.0
    for label in sorted(heights, key=_order):
        tops[label] = bottom
        bottom += heights[label] * ROW + 6
    svg = Svg(frame, bottom + 24, f"{title}: lanes over time")
    svg.text(0, 14, f"{title}: {format_seconds(high - low)}", "title")
    seconds_axis(svg, frame, low, high, 20, bottom)
    x = scale(frame, low, high)
    for label, top in tops.items():
        svg.text(frame.left - 8, top + 13, clip(label, frame.left - 8), "label", "end")
    for span, _ in laid:
        if _is_stall(span):
            svg.rect(x(span.start), 20, max(x(span.end) - x(span.start), 0.4), bottom - 20, "shade")
    for span, row in laid:
        left, right = x(span.start), x(span.end)
        is_stall = _is_stall(span)
        kind = "stall" if is_stall else span.lane if span.lane in LANES else "other"
        top = tops[span.lane] + row * ROW
        svg.rect(left, top, max(right - left, 0.4), ROW - 3, f"span {kind}", _tip(span))
        short = "" if is_stall else clip(span.name.removeprefix("model.").removeprefix("layers."), right - left - 6)
        if short and not short.startswith("…"):
            svg.text(left + 3, top + 11.5, short, "inside")
    for mark in trace.marks:
        if low < mark.time < high:
            svg.line(x(mark.time), 20, x(mark.time), bottom, "mark")
    return str(svg), "; ".join(notes)


def _row_label(span: Span) -> str:
    """The span's lane; for a stall, "waits:" and its cause, which is the name's first word."""
    return f"waits: {span.name.partition(' ')[0].removeprefix('compute:')}" if span.lane == "stall" else span.lane


def _is_stall(span: Span) -> bool:
    return span.lane.startswith("waits: ")


def _order(label: str) -> tuple[int, str]:
    known = LANES.index(label) if label in LANES else len(LANES)
    return (len(LANES) + 1 if label.startswith("waits: ") else known), label


def _tip(span: Span) -> str:
    length = span.end - span.start
    text = f"{span.name}: {format_seconds(length)}"
    if span.nbytes:
        text += f", {format_bytes(span.nbytes)}"
        if length > 0:
            text += f", {format_rate(span.nbytes / length)}"
    return text
