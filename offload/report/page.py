"""The page: sections in order, around pictures and tables that other files make."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from offload.report.facts import asked, compared, found, notes
from offload.report.gantt import gantt, windows
from offload.report.links import links
from offload.report.memory import memory
from offload.report.predicted import predicted
from offload.report.recorded import Trace
from offload.report.style import STYLE
from offload.report.svg import escape

# The page may not load anything, whatever text ends up in it.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
NO_TRACE = "No trace was given, so nothing is known of single moments: run with --trace FILE and report with it."


def page(run: Mapping[str, Any], trace: Trace | None = None) -> str:
    """A whole HTML document.

    Args:
        run: what `offload run --json` printed.
        trace: what `offload run --trace` wrote in the same run; without it, the page has no lanes and no links.
    """
    model = escape(run.get("model"))
    body = [
        f"<h1>{model}</h1>",
        *_section("This run", [_facts(found(run)), *(f'<p class="note">{escape(n)}</p>' for n in notes(run))]),
        *_section("Predicted beside measured", [*predicted(run), _compared(run)]),
        *_section("Lanes", _lanes(trace)),
        *_section("Memory", memory(run, trace)),
        *_section("Disk and link", links(run, trace) if trace else []),
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
            f"<title>offload: {model}</title>",
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


def _lanes(trace: Trace | None) -> Iterable[str]:
    if trace is None:
        yield f'<p class="note">{escape(NO_TRACE)}</p>'
        return
    for window in windows(trace):
        picture, note = gantt(trace, window)
        yield picture
        if note:
            yield f'<p class="note">{escape(note)}</p>'


def _section(title: str, parts: Iterable[str]) -> list[str]:
    inside = [part for part in parts if part]
    return ["<section>", f"<h2>{escape(title)}</h2>", *inside, "</section>"] if inside else []


def _facts(rows: Sequence[tuple[str, str]]) -> str:
    lines = [f'<tr><th scope="row">{escape(label)}</th><td>{escape(value)}</td></tr>' for label, value in rows]
    return "\n".join(('<table class="facts">', *lines, "</table>")) if lines else ""


def _compared(run: Mapping[str, Any]) -> str:
    rows = compared(run)
    if not rows:
        return '<p class="note">The run made no prediction.</p>'
    head = "".join(f'<th scope="col">{word}</th>' for word in ("", "predicted", "measured", "difference"))
    lines = [
        f'<tr><th scope="row">{escape(name)}</th>' + "".join(f"<td>{escape(v)}</td>" for v in values) + "</tr>"
        for name, *values in rows
    ]
    return "\n".join(('<table class="figures">', f"<tr>{head}</tr>", *lines, "</table>"))
