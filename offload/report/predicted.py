"""Predicted beside measured, for the first pass and for a later step, with what each resource alone would need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from offload.report.axes import scale
from offload.report.recorded import number
from offload.report.svg import Frame, Svg
from offload.units import format_seconds

ROW = 22
ROOM = 56  # for a figure behind its bar
Bar = tuple[str, str, float]
INTERVALS = {"prefill_s": "prefill_interval", "decode_s_per_token": "interval"}


def predicted(run: Mapping[str, Any], frame: Frame) -> list[str]:
    """A picture for each kind of step that has anything to show."""
    found = []
    for title, name in (("First pass", "prefill_s"), ("A later step", "decode_s_per_token")):
        measured, expected = number(run, name), number(run, "predicted", name)
        bars: list[Bar] = []
        if expected is not None:
            bars.append(("predicted", "predicted", expected))
        if measured is not None:
            bars.append(("measured", "measured", measured))
        if name == "decode_s_per_token" and bars:
            bars += _needs(run)
        if bars:
            found.append(_bars(title, bars, _interval(run, INTERVALS[name]), frame))
    return found


def _needs(run: Mapping[str, Any]) -> list[Bar]:
    """What the bound is made of, and the waits."""
    bars: list[Bar] = []
    for label, key in (("disk alone", "disk_s"), ("link alone", "link_s"), ("compute alone", "compute_s")):
        value = number(run, "bound", key)
        if value:
            bars.append((label, {"disk_s": "read", "link_s": "upload", "compute_s": "compute"}[key], value))
    stalls = run.get("stalls")
    for cause in stalls if isinstance(stalls, Mapping) else ():
        value = number(run, "stalls", cause)
        if value:
            bars.append((f"waits: {str(cause).removeprefix('compute:')}", "stall", value))
    return bars


def _interval(run: Mapping[str, Any], name: str) -> tuple[float, float] | None:
    expected = run.get("predicted")
    pair = expected.get(name) if isinstance(expected, Mapping) else None
    if not isinstance(pair, list) or len(pair) != 2:
        return None
    low, high = (number({"x": value}, "x") for value in pair)
    return None if low is None or high is None else (low, high)


def _bars(title: str, bars: list[Bar], interval: tuple[float, float] | None, frame: Frame) -> str:
    most = max([*(value for _, _, value in bars), interval[1] if interval else 0.0, 1e-9])
    x = scale(frame, 0.0, most * (frame.right - frame.left) / (frame.right - frame.left - ROOM))
    svg = Svg(frame, 26 + ROW * len(bars), f"{title}: predicted and measured seconds")
    svg.text(0, 14, title, "title")
    for k, (label, kind, value) in enumerate(bars):
        top, end, tip = 22 + k * ROW, x(value), f"{label}: {format_seconds(value)}"
        if kind == "predicted" and interval is not None:
            tip += f", nine of ten from {format_seconds(interval[0])} to {format_seconds(interval[1])}"
        svg.text(frame.left - 8, top + 13, label, "label", "end")
        svg.rect(frame.left, top, max(end - frame.left, 0.4), ROW - 5, f"span {kind}", tip)
        if kind == "predicted" and interval is not None:
            middle = top + (ROW - 5) / 2
            svg.line(x(interval[0]), middle, x(interval[1]), middle, "whisker")
            for value_at in interval:
                svg.line(x(value_at), middle - 4, x(value_at), middle + 4, "whisker")
            end = max(end, x(interval[1]))
        svg.text(end + 6, top + 13, format_seconds(value), "label")
    return str(svg)
