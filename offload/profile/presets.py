"""Profiles that ship with the package: common machines from data sheets and published figures, all estimates."""

from __future__ import annotations

import difflib
from functools import cache
from importlib.resources import files

from offload.errors import UsageError
from offload.profile.machine import Profile
from offload.profile.text import parse


@cache
def presets() -> tuple[str, ...]:
    """Their names, sorted."""
    return tuple(
        sorted(f.name[:-5] for f in files("offload").joinpath("presets").iterdir() if f.name.endswith(".toml"))
    )


def preset(name: str) -> Profile:
    """One of them.

    Raises:
        UsageError: there is none of that name; says which there are.
    """
    if name not in presets():
        near = difflib.get_close_matches(name, presets(), n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"there is no hardware preset {name!r}{hint}; there are {', '.join(presets())}")
    return parse(files("offload").joinpath("presets", f"{name}.toml").read_text())
