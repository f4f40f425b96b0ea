"""The roofline of blocks: what each reached, beside what its processor's measured ceilings allow at its intensity.

A block that computes few operations for each byte it reads can at best run as fast as memory brings bytes; one that
computes many, as fast as the processor multiplies (Williams, Waterman and Patterson 2009). A dot's distance below the
line is what is left to win.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from offload.report.recorded import Trace, number
from offload.report.svg import Frame, Svg
from offload.units import format_rate, format_seconds

HEIGHT = 250
PHASES = {"prefill": ("first pass", "first"), "decode": ("later steps", "later")}
_NUMBER = re.compile(r"\.\d+")


@dataclass(frozen=True, slots=True)
class Point:
    """A unit in one phase: operations, bytes and seconds of its forward (the median of all that were traced)."""

    name: str
    phase: str
    flops: float
    nbytes: float
    seconds: float

    @property
    def intensity(self) -> float:
        return self.flops / self.nbytes

    @property
    def flops_per_s(self) -> float:
        return self.flops / self.seconds

    @property
    def bytes_per_s(self) -> float:
        return self.nbytes / self.seconds


@dataclass(frozen=True, slots=True)
class Roof:
    """The ceilings of a processor, per second."""

    flops: float
    nbytes: float
    is_measured: bool

    def at(self, intensity: float) -> float:
        return min(self.flops, self.nbytes * intensity)

    @property
    def ridge(self) -> float:
        """The intensity from which computing is the limit."""
        return self.flops / self.nbytes


def roof(run: Mapping[str, Any]) -> Roof | None:
    """What `run --json` says of the ceilings; None where it says nothing."""
    flops, nbytes = (number(run, "roofline", name) for name in ("flops_per_s", "bytes_per_s"))
    found = run.get("roofline")
    if not flops or not nbytes or flops < 0 or nbytes < 0 or not isinstance(found, Mapping):
        return None
    return Roof(flops, nbytes, found.get("measured") is True)


def points(run: Mapping[str, Any], trace: Trace | None) -> list[Point]:
    """Every unit whose forward was traced, in each phase."""
    found = run.get("roofline")
    units = found.get("units") if isinstance(found, Mapping) else None
    if trace is None or not isinstance(units, list) or len(trace.marks) < 2:
        return []
    seconds: dict[tuple[str, str], list[float]] = {}
    turn, last = trace.marks[1].time, trace.marks[-1].time
    for span in trace.spans:
        if span.lane == "compute" and 0 <= span.start < last:
            phase = "prefill" if span.start < turn else "decode"
            seconds.setdefault((span.name, phase), []).append(span.end - span.start)
    made = []
    for unit in units:
        for phase in PHASES:
            flops, nbytes = number(unit, phase, "flops"), number(unit, phase, "bytes")
            took = seconds.get((str(unit.get("name")), phase)) if isinstance(unit, Mapping) else None
            if flops and nbytes and took and flops > 0 and nbytes > 0 and median(took) > 0:
                made.append(Point(str(unit["name"]), phase, flops, nbytes, median(took)))
    return made


def roofline(run: Mapping[str, Any], trace: Trace | None, frame: Frame) -> list[str]:
    """The picture; none where ceilings or times are unknown."""
    top, dots = roof(run), points(run, trace)
    return [_picture(top, dots, frame)] if top is not None and dots else []


def summary(run: Mapping[str, Any], trace: Trace | None) -> list[tuple[str, str, str, str, str, str]]:
    """(what, time, of the ceiling, operations a byte, operations/s, bytes/s) for each kind of unit and phase."""
    top = roof(run)
    if top is None:
        return []
    kinds: dict[tuple[str, str], list[Point]] = {}
    for point in points(run, trace):
        kinds.setdefault((point.phase, _NUMBER.sub(".*", point.name)), []).append(point)
    rows = []
    for (phase, kind), group in kinds.items():
        label = f"{len(group)} x {kind}" if len(group) > 1 else group[0].name
        rows.append(
            (
                f"{PHASES[phase][0]}: {label}",
                format_seconds(median(p.seconds for p in group)),
                f"{median(p.flops_per_s / top.at(p.intensity) for p in group):.0%}",
                f"{median(p.intensity for p in group):.3g}",
                _flops(median(p.flops_per_s for p in group)),
                format_rate(median(p.bytes_per_s for p in group)),
            )
        )
    return rows


def _picture(top: Roof, dots: list[Point], frame: Frame) -> str:
    low = min([p.intensity for p in dots] + [top.ridge]) / 2
    high = max([p.intensity for p in dots] + [top.ridge]) * 2.5
    floor = min([p.flops_per_s for p in dots] + [top.at(low)]) / 2
    ceiling = max([p.flops_per_s for p in dots] + [top.flops]) * 2
    begin, end = 26.0, 26.0 + HEIGHT

    def x(value: float) -> float:
        part = math.log(value / low) / math.log(high / low)
        return frame.left + min(max(part, 0.0), 1.0) * (frame.right - frame.left)

    def y(value: float) -> float:
        part = math.log(value / floor) / math.log(ceiling / floor)
        return end - min(max(part, 0.0), 1.0) * HEIGHT

    svg = Svg(frame, end + 38, "Roofline of blocks: operations per second over operations per byte")
    source = "measured" if top.is_measured else "estimated"
    svg.text(0, 14, f"Blocks below the {source} ceilings of their processor", "title")
    for value in _powers(low, high):
        svg.line(x(value), begin, x(value), end, "grid")
        svg.text(x(value), end + 15, f"{value:g}", "tick", "middle")
    for value in _powers(floor, ceiling):
        svg.line(frame.left, y(value), frame.right, y(value), "grid")
        svg.text(frame.left - 6, y(value) + 4, _flops(value), "tick", "end")
    middle = (frame.left + frame.right) / 2
    svg.text(middle, end + 31, "operations for each byte of weights, keys and values", "tick", "middle")
    corner = (x(top.ridge), y(top.flops))
    svg.path([(frame.left, y(top.at(low))), corner, (frame.right, corner[1])], "curve roof")
    svg.text(frame.right, corner[1] - 6, f"{_flops(top.flops)} of products", "roof-name", "end")
    half = math.sqrt(low * top.ridge)
    svg.text(x(half) + 12, y(top.at(half)) + 14, f"{format_rate(top.nbytes)} of memory", "roof-name")
    for point in dots:
        said = (
            f"{point.name}, {PHASES[point.phase][0]}: {format_seconds(point.seconds)}, {_flops(point.flops_per_s)}, "
            f"{format_rate(point.bytes_per_s)}, {point.flops_per_s / top.at(point.intensity):.0%} of the ceiling"
        )
        svg.dot(x(point.intensity), y(point.flops_per_s), 4.5, f"dot {PHASES[point.phase][1]}", said)
    return str(svg)


def _powers(low: float, high: float) -> list[float]:
    """Powers of ten between two values; of two or five as well where those are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for steps in ((1,), (1, 3), (1, 2, 5)):
        found = [k * 10.0**power for power in range(first, last + 1) for k in steps if low <= k * 10.0**power <= high]
        if len(found) >= 4:
            break
    return found


def _flops(per_s: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if per_s < 1000 or unit == "T":
            return f"{per_s:.3g} {unit}FLOP/s"
        per_s /= 1000
    raise AssertionError("unreachable")
