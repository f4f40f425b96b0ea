"""Memory of each tier at every token, against its budget and its peak."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from offload.report.axes import amounts_axis, scale, seconds_axis
from offload.report.recorded import Trace, number
from offload.report.svg import Frame, Svg, ticks
from offload.units import format_bytes

TIERS = {"cpu_memory": ("Main memory", "peak_rss_bytes"), "gpu_memory": ("Device memory", "device_peak_bytes")}
HEIGHT = 150


def memory(run: Mapping[str, Any], trace: Trace | None, frame: Frame) -> list[str]:
    """A picture for each tier that has a budget or was used."""
    return [_tier(run, trace, key, frame) for key in TIERS if number(run, "budgets", key) or number(run, TIERS[key][1])]


def _tier(run: Mapping[str, Any], trace: Trace | None, key: str, frame: Frame) -> str:
    title, measured = TIERS[key]
    budget, peak = number(run, "budgets", key), number(run, measured)
    marks = [m for m in (trace.marks if trace else ()) if key in m.memory]
    # A budget may be many times what was used: above four times, it is written, not drawn.
    most = max([peak or 0.0, *(m.memory[key] for m in marks)])
    drawn_budget = budget if budget and budget <= 4 * max(most, 1) else None
    high = max(most, drawn_budget or 0.0, 1.0) * 1.08
    top, bottom = 24.0, 24.0 + HEIGHT
    svg = Svg(frame, bottom + 24, f"{title} over time")
    said = [f"peak {format_bytes(peak)}"] if peak is not None else []
    said += [f"budget {format_bytes(budget)}"] if budget else []
    svg.text(0, 14, f"{title}: {', '.join(said)}", "title")

    def y(value: float) -> float:
        return bottom - value / high * HEIGHT

    amounts_axis(svg, frame, ticks(high, 4, base=2.0), y, format_bytes)
    if len(marks) > 1:
        low, end = marks[0].time, marks[-1].time
        seconds_axis(svg, frame, low, end, top, bottom)
        x = scale(frame, low, end)
        line = [(x(m.time), y(m.memory[key])) for m in marks]
        svg.path([(line[0][0], bottom), *line, (line[-1][0], bottom)], "area memory")
        svg.path(line, "curve memory-line")
    elif peak is not None:
        svg.rect(
            frame.left, y(peak), frame.right - frame.left, bottom - y(peak), "area memory", f"peak {format_bytes(peak)}"
        )
    if peak is not None:
        svg.line(frame.left, y(peak), frame.right, y(peak), "peak")
        svg.text(frame.left + 4, y(peak) - 4, "peak", "tick")
    if drawn_budget:
        svg.line(frame.left, y(drawn_budget), frame.right, y(drawn_budget), "limit")
        svg.text(frame.right, y(drawn_budget) - 4, "budget", "tick", "end")
    return str(svg)
