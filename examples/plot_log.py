"""Draws the losses of a run's log.jsonl as an SVG: every step, their running mean, and the loss on held-out data.

python examples/plot_log.py out/log.jsonl loss.svg
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

WIDTH, HEIGHT = 640, 320
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 28, 36  # margins
TRAIN, MEAN, HELD_OUT, INK = "#b8c4d6", "#2f5d9b", "#c2571a", "#555"
Point = tuple[float, float]


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers from low to high, about `count` of them."""
    size = (high - low) / count
    power = 10 ** math.floor(math.log10(size))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= size)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def running_mean(points: Sequence[Point], share: float = 0.1) -> list[Point]:
    """An exponential mean, started at the first point."""
    found: list[Point] = []
    for x, y in points:
        found.append((x, y if not found else (1 - share) * found[-1][1] + share * y))
    return found


def draw(lines: Sequence[dict[str, float]], title: str) -> str:
    """The picture as a text."""
    train = [(x["step"], x["loss"]) for x in lines if "loss" in x]
    held_out = [(x["step"], x["eval_loss"]) for x in lines if "eval_loss" in x]
    everything = train + held_out
    last = max(x for x, _ in everything)
    low, high = min(y for _, y in everything), max(y for _, y in everything)
    low, high = low - 0.05 * (high - low), high + 0.05 * (high - low)

    def at(point: Point) -> str:
        x = LEFT + point[0] / last * (WIDTH - LEFT - RIGHT)
        y = TOP + (high - point[1]) / (high - low) * (HEIGHT - TOP - BOTTOM)
        return f"{x:.1f},{y:.1f}"

    def curve(points: Sequence[Point], colour: str, width: float) -> str:
        return f'<polyline points="{" ".join(map(at, points))}" fill="none" stroke="{colour}" stroke-width="{width}"/>'

    def text(x: float, y: float, what: str, anchor: str = "middle", colour: str = INK) -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{what}</text>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        text(LEFT, 17, title, "start"),
    ]
    for value in ticks(low, high, 6):
        x, y = at((0, value)).split(",")
        parts.append(f'<path d="M{x} {y}H{WIDTH - RIGHT}" stroke="#e4e4e4"/>')
        parts.append(text(LEFT - 6, float(y) + 4, f"{value:g}", "end"))
    for value in ticks(0, last, 8):
        parts.append(text(float(at((value, low)).split(",")[0]), HEIGHT - BOTTOM + 16, f"{value:g}"))
    parts += [curve(train, TRAIN, 1), curve(running_mean(train), MEAN, 2)]
    if held_out:
        parts.append(curve(held_out, HELD_OUT, 1.5))
        for point in held_out:
            x, y = at(point).split(",")
            parts.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{HELD_OUT}"/>')
    parts += [
        text(WIDTH / 2, HEIGHT - 5, "step"),
        text(WIDTH - RIGHT, 17, "● held out", "end", HELD_OUT),
        text(WIDTH - RIGHT - 75, 17, "— training, running mean", "end", MEAN),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    log, out = map(Path, sys.argv[1:3])
    out.write_text(draw([json.loads(line) for line in log.read_text().splitlines()], "loss, nats a token"))
