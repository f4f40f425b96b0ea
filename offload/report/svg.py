"""A small SVG writer: every text and attribute is escaped, and colours are classes that the page's style gives."""

from __future__ import annotations

import html
import math
import re
from dataclasses import dataclass

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffe\uffff]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """A width that pictures are drawn for; the page shows the one that its window has room for.

    Attributes:
        name: the class of such pictures.
        width: of a picture, in the units that text is drawn in.
        left: where the drawing area begins; row labels stand before it.
        spans: of a Gantt, at most.
    """

    name: str
    width: int
    left: int
    spans: int

    @property
    def right(self) -> int:
        return self.width - 14

    def count(self, wide: int) -> int:
        """How many of something a picture has room for that has room for `wide` when it is wide."""
        return max(2, round(wide * min(1.0, (self.right - self.left) / 820)))


WIDE = Frame(name="wide", width=960, left=104, spans=3_000)
NARROW = Frame(name="narrow", width=400, left=86, spans=1_000)


def escape(text: object) -> str:
    """Any text as HTML shows it; what no page may hold (control characters, lone surrogates) becomes U+FFFD or ?."""
    clean = str(text).encode("utf-8", "replace").decode()
    return html.escape(_CONTROL.sub("\ufffd", clean), quote=True)


class Svg:
    """One picture, as wide as its frame, that scales with the page.

    Args:
        frame: the width.
        height: in the same units.
        label: what the picture shows, for those who hear the page.
    """

    def __init__(self, frame: Frame, height: float, label: str) -> None:
        size = f'class="{frame.name}" viewBox="0 0 {frame.width} {_number(height)}"'
        self._head = f'<svg {size} role="img" aria-label="{escape(label)}">'
        self._parts: list[str] = []

    def rect(self, x: float, y: float, width: float, height: float, kind: str, tip: str = "") -> None:
        """A box; `tip` shows when a pointer rests on it."""
        title = f"<title>{escape(tip)}</title>" if tip else ""
        at = f'x="{_number(x)}" y="{_number(y)}" width="{_number(width)}" height="{_number(height)}"'
        self._parts.append(f'<rect class="{escape(kind)}" {at}>{title}</rect>')

    def dot(self, x: float, y: float, radius: float, kind: str, tip: str = "") -> None:
        """A disc; `tip` shows when a pointer rests on it."""
        title = f"<title>{escape(tip)}</title>" if tip else ""
        at = f'cx="{_number(x)}" cy="{_number(y)}" r="{_number(radius)}"'
        self._parts.append(f'<circle class="{escape(kind)}" {at}>{title}</circle>')

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        at = f'x1="{_number(x1)}" y1="{_number(y1)}" x2="{_number(x2)}" y2="{_number(y2)}"'
        self._parts.append(f'<line class="{escape(kind)}" {at}></line>')

    def path(self, points: list[tuple[float, float]], kind: str) -> None:
        """A line through points; whether it is filled is its class's matter."""
        joined = " ".join(f"{_number(x)},{_number(y)}" for x, y in points)
        self._parts.append(f'<polyline class="{escape(kind)}" points="{joined}"></polyline>')

    def text(self, x: float, y: float, text: str, kind: str = "label", anchor: str = "start") -> None:
        at = f'x="{_number(x)}" y="{_number(y)}" text-anchor="{escape(anchor)}"'
        self._parts.append(f'<text class="{escape(kind)}" {at}>{escape(text)}</text>')

    def __str__(self) -> str:
        return "\n".join((self._head, *self._parts, "</svg>"))


def ticks(high: float, count: int = 6, base: float = 10.0) -> list[float]:
    """Round values from 0 to `high`: about `count` steps of 1, 2 or 5 times a power of ten, or of powers of two."""
    if high <= 0:
        return [0.0]
    rough = high / count
    if base == 2.0:
        step = 2.0 ** math.ceil(math.log2(rough))
    else:
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * k for k in (1, 2, 5, 10) if power * k >= rough * (1 - 1e-9))
    return [k * step for k in range(math.floor(high / step + 1e-9) + 1)]


def clip(text: str, width: float, em: float = 5.8) -> str:
    """As much of a text as `width` units hold, from its end: names of units differ there."""
    room = int(width / em)
    if len(text) <= room:
        return text
    return "…" + text[len(text) - room + 1 :] if room > 1 else ""


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
