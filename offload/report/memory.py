"""Memory of each tier at every token, against its budget and its peak."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from offload.report.axes import amounts_axis, scale, seconds_axis
from offload.report.recorded import Trace, number
from offload.report.svg import LEFT, RIGHT, Svg, ticks
from offload.units import format_bytes

TIERS = {"cpu_memory": ("Main memory", "peak_rss_bytes"), "gpu_memory": ("Device memory", "device_peak_bytes")}
HEIGHT = 150


def memory(run: Mapping[str, Any], trace: Trace | None) -> list[str]:
    """A picture for each tier that has a budget or was used."""
    return [_tier(run, trace, key) for key in TIERS if number(run, "budgets", key) or number(run, TIERS[key][1])]


def _tier(run: Mapping[str, Any], trace: Trace | None, key: str) -> str:
    title, measured = TIERS[key]
    budget, peak = number(run, "budgets", key), number(run, measured)
    marks = [m for m in (trace.marks if trace else ()) if key in m.memory]
    # A budget may be many times what was used: above four times, it is written, not drawn.
    most = max([peak or 0.0, *(m.memory[key] for m in marks)])
    drawn_budget = budget if budget and budget <= 4 * max(most, 1) else None
    high = max(most, drawn_budget or 0.0, 1.0) * 1.08
    top, bottom = 24.0, 24.0 + HEIGHT
    svg = Svg(bottom + 24, f"{title} over time")
    said = [f"peak {format_bytes(peak)}"] if peak is not None else []
    said += [f"budget {format_bytes(budget)}"] if budget else []
    svg.text(LEFT, 14, f"{title}: {', '.join(said)}", "title")

    def y(value: float) -> float:
        return bottom - value / high * HEIGHT

    amounts_axis(svg, ticks(high, 4, base=2.0), y, format_bytes)
    if len(marks) > 1:
        low, end = marks[0].time, marks[-1].time
        seconds_axis(svg, low, end, top, bottom)
        x = scale(low, end)
        line = [(x(m.time), y(m.memory[key])) for m in marks]
        svg.path([(line[0][0], bottom), *line, (line[-1][0], bottom)], "area memory")
        svg.path(line, "curve memory-line")
    elif peak is not None:
        svg.rect(LEFT, y(peak), RIGHT - LEFT, bottom - y(peak), "area memory", f"peak {format_bytes(peak)}")
    if peak is not None:
        svg.line(LEFT, y(peak), RIGHT, y(peak), "peak")
        svg.text(LEFT + 4, y(peak) - 4, "peak", "tick")
    if drawn_budget:
        svg.line(LEFT, y(drawn_budget), RIGHT, y(drawn_budget), "limit")
        svg.text(RIGHT, y(drawn_budget) - 4, "budget", "tick", "end")
    return str(svg)
