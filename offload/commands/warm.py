"""`offload doctor --warm`: compiles every CPU kernel, so that no later run has to."""

from __future__ import annotations

import importlib

from rich.console import Console
from rich.status import Status

from offload.commands.telling import say
from offload.kernels import available
from offload.units import format_seconds


def execute(console: Console) -> None:
    """Compiles what is not in the cache and says how long it took."""
    if (state := available()["cpu"]) != "yes":
        say(console, f"no CPU kernels to compile: {state}", style="")
        return
    warm = importlib.import_module("offload.kernels.cpu.warm")
    with Status("compiling kernels", console=console) as shown:
        seconds = warm.compile_all(lambda name, k, n: shown.update(f"compiling kernels: {name}, {k + 1} of {n}"))
    say(console, f"CPU kernels are compiled ({format_seconds(seconds)}) and in the cache", style="")
