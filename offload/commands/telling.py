"""A line for the reader of a terminal or of a log: whole, however long, and as it is, whatever brackets it has."""

from __future__ import annotations

from rich.console import Console


def say(console: Console, text: str, style: str = "dim") -> None:
    """One line. The terminal wraps it; a file gets it in one piece."""
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


def note(console: Console, text: str) -> None:
    """Something that the reader may want to change."""
    say(console, f"note: {text}", "yellow")
