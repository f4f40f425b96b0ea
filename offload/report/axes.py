"""Axes that several pictures share: seconds to the right, amounts upwards, each with round values."""

from __future__ import annotations

from collections.abc import Callable

from offload.report.svg import Frame, Svg, ticks
from offload.units import format_seconds


def scale(frame: Frame, low: float, high: float) -> Callable[[float], float]:
    """From a value to its x in the drawing area."""
    length = max(high - low, 1e-9)
    return lambda value: frame.left + (min(max(value, low), high) - low) / length * (frame.right - frame.left)


def seconds_axis(svg: Svg, frame: Frame, low: float, high: float, top: float, bottom: float) -> None:
    """Lines and times, counted from `low`, below the drawing area."""
    x = scale(frame, low, high)
    for value in ticks(high - low, frame.count(8)):
        at = x(low + value)
        svg.line(at, top, at, bottom, "grid")
        svg.text(at, bottom + 15, "0" if value == 0 else format_seconds(value), "tick", "middle")


def amounts_axis(
    svg: Svg, frame: Frame, values: list[float], y: Callable[[float], float], name: Callable[[float], str]
) -> None:
    """Lines and amounts before the drawing area."""
    for value in values:
        svg.line(frame.left, y(value), frame.right, y(value), "grid")
        svg.text(frame.left - 6, y(value) + 4, "0" if value == 0 else name(value), "tick", "end")
