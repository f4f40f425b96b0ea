"""The page: sections in order, around pictures and tables that other files make."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from offload.report.facts import asked, compared, found, kernels, notes, said, tiles
from offload.report.gantt import gantt, windows
from offload.report.links import links
from offload.report.memory import memory
from offload.report.predicted import predicted
from offload.report.recorded import Trace
from offload.report.roofline import roofline, summary
from offload.report.style import STYLE
from offload.report.svg import NARROW, WIDE, Frame, escape

# The page may not load anything, whatever text ends up in it.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
NO_TRACE = "No trace was given, so nothing is known of single moments: run with --trace FILE and report with it."
NO_ROOFLINE = (
    "There is no roofline: it needs a trace, a profile of the machine, and a processor whose forwards end with their "
    "computing, which those of a GPU do not."
)
LANES = (("read", "reads"), ("upload", "uploads"), ("compute", "computes"), ("stall", "the model waits"))
PHASES = (("first", "first pass"), ("later", "later steps"))


def page(run: Mapping[str, Any], trace: Trace | None = None) -> str:
    """A whole HTML document.

    Args:
        run: what `offload run --json` printed.
        trace: what `offload run --trace` wrote in the same run; without it, the page has no lanes, links and roofline.
    """
    model = str(run.get("model"))
    name = model.rstrip("/").rpartition("/")[2] or model
    notices = [f'<p class="note">{escape(n)}</p>' for n in notes(run)]
    beside = ("", "predicted", "measured", "difference")
    roofs = ("", "time", "of the ceiling", "FLOP/byte", "operations", "memory")
    body = [
        f"<header><h1>{escape(name)}</h1><p>{escape(said(run))}</p></header>",
        _tiles(tiles(run)),
        *_section("Predicted beside measured", [*_both(lambda f: predicted(run, f)), _compared(run, beside)]),
        *_section("Lanes", _lanes(trace)),
        *_section("Roofline of blocks", _roofline(run, trace, roofs)),
        *_section("Memory", _both(lambda f: memory(run, trace, f))),
        *_section("Disk and link", _both(lambda f: links(run, trace, f)) if trace else []),
        *_section("This run", [_facts(found(run)), *notices]),
        *_section("Kernels", [_facts(kernels(run))]),
        *_section("What it was given", [_facts(asked(run))]),
    ]
    return "\n".join(
        (
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>offload: {escape(name)}</title>",
            f"<style>{STYLE}</style>",
            "</head>",
            "<body>",
            "<main>",
            *body,
            "</main>",
            "</body>",
            "</html>",
            "",
        )
    )


def _both(draw: Callable[[Frame], Iterable[str]]) -> list[str]:
    """Pictures for wide windows and for narrow ones, of which a window shows one."""
    return [picture for pair in zip(draw(WIDE), draw(NARROW), strict=True) for picture in pair]


def _lanes(trace: Trace | None) -> Iterable[str]:
    if trace is None:
        yield f'<p class="note">{escape(NO_TRACE)}</p>'
        return
    lanes = {span.lane for span in trace.spans}
    yield _key([(kind, label) for kind, label in LANES if kind in lanes])
    for window in windows(trace):
        for frame in (WIDE, NARROW):
            picture, note = gantt(trace, window, frame)
            yield picture
        if note:
            yield f'<p class="note">{escape(note)}</p>'


def _roofline(run: Mapping[str, Any], trace: Trace | None, head: Sequence[str]) -> Iterable[str]:
    pictures = _both(lambda frame: roofline(run, trace, frame))
    if not pictures:
        yield f'<p class="note">{escape(NO_ROOFLINE)}</p>'
        return
    yield _key(PHASES)
    yield from pictures
    yield _figures(head, summary(run, trace))


def _key(entries: Iterable[tuple[str, str]]) -> str:
    """What the colours mean."""
    items = "".join(f'<li><i class="{kind}"></i>{escape(label)}</li>' for kind, label in entries)
    return f'<ul class="key">{items}</ul>' if items else ""


def _tiles(rows: Iterable[tuple[str, str, str]]) -> str:
    lines = [
        f'<div class="tile"><span>{escape(label)}</span><b>{escape(value)}</b><span>{escape(note)}</span></div>'
        for label, value, note in rows
    ]
    return "\n".join(('<div class="tiles">', *lines, "</div>")) if lines else ""


def _section(title: str, parts: Iterable[str]) -> list[str]:
    inside = [part for part in parts if part]
    return ["<section>", f"<h2>{escape(title)}</h2>", *inside, "</section>"] if inside else []


def _facts(rows: Sequence[tuple[str, str]]) -> str:
    lines = [f'<tr><th scope="row">{escape(label)}</th><td>{escape(value)}</td></tr>' for label, value in rows]
    return "\n".join(('<table class="facts">', *lines, "</table>")) if lines else ""


def _compared(run: Mapping[str, Any], head: Sequence[str]) -> str:
    rows = compared(run)
    return _figures(head, rows) if rows else '<p class="note">The run made no prediction.</p>'


def _figures(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    first = "".join(f'<th scope="col">{escape(word)}</th>' for word in head)
    lines = [
        f'<tr><th scope="row">{escape(name)}</th>' + "".join(f"<td>{escape(v)}</td>" for v in values) + "</tr>"
        for name, *values in rows
    ]
    return "\n".join(('<div class="scroll"><table class="figures">', f"<tr>{first}</tr>", *lines, "</table></div>"))
