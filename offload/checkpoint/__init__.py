"""Checkpoints: finding one, opening it for streaming, its outline and numbers, and writing packed ones.

Names are looked up when they are first used (PEP 562): a plan of a known decoder needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from offload.checkpoint.finding import find
    from offload.checkpoint.opening import Opened, open_checkpoint
    from offload.checkpoint.skeleton import read_config

__all__ = ["Opened", "find", "open_checkpoint", "read_config"]

_HOMES = {
    "Opened": "opening",
    "find": "finding",
    "open_checkpoint": "opening",
    "read_config": "skeleton",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    found: object = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = found
    return found
