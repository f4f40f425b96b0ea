"""Where transformers' models look up what computes their attention and their experts: a name in their configuration.

The public way to set it goes on to configurations within; the name behind it is private to transformers, and may vanish
from it. So what was set is looked at the way models do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

from offload.errors import ModelError

What = Literal["attn", "experts"]


class Vanished(ModelError):
    """This transformers has no such name, or does not heed it."""


def said(config: Any, what: What) -> Any:
    """What a configuration says; None where it is not one of transformers.

    Raises:
        Vanished: it says nothing of the kind.
    """
    if not hasattr(config, "get_text_config"):
        return None
    if not hasattr(config, f"_{what}_implementation"):
        raise _vanished(f"_{what}_implementation", what)
    return getattr(config, f"_{what}_implementation")


def say(configs: Iterable[Any], what: What, name: str) -> Callable[[], None]:
    """Has models with these configurations look up `name`; returns what leaves them as they were.

    Raises:
        Vanished: they would not. Nothing has changed.
    """
    private, before = f"_{what}_implementation_internal", [(config, said(config, what)) for config in configs]
    if not all(hasattr(config, private) for config, _ in before):
        raise _vanished(private, what)

    def restore() -> None:
        for config, old in before:
            if getattr(config, private) == name:  # nobody has changed it since
                setattr(config, private, old)

    for config, _ in before:
        setattr(config, private, name)
    if any(said(config, what) != name for config, _ in before):
        restore()
        raise _vanished(private, what)
    return restore


def _vanished(name: str, what: What) -> Vanished:
    from transformers import __version__

    part = "attention" if what == "attn" else "experts"
    return Vanished(f"transformers {__version__} does not heed {name}, so its own ops compute {part}")
