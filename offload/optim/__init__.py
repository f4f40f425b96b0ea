"""Optimizers by name. Each is a file of its own that declares what its state costs beside what it does."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from offload.errors import UsageError
from offload.kernels.chosen import Kernels
from offload.optim.adafactor import Adafactor
from offload.optim.adamw import AdamW
from offload.optim.adamw_8bit import AdamW8bit
from offload.optim.apollo import Apollo
from offload.optim.base import Optimizer
from offload.optim.sgd import SGD

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adamw": AdamW,
    "adamw_8bit": AdamW8bit,
    "sgd": SGD,
    "adafactor": Adafactor,
    "apollo": Apollo,
}


def options_of(name: str) -> frozenset[str]:
    """The numbers that an optimizer takes.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in OPTIMIZERS:
        raise UsageError(f"optimizer={name!r} is not known; there are {', '.join(OPTIMIZERS)}")
    return frozenset(inspect.signature(OPTIMIZERS[name]).parameters) - {"kernels"}


def make(name: str, kernels: Kernels, **options: Any) -> Optimizer:
    """The optimizer of that name.

    Args:
        options: its numbers; None takes its own default.

    Raises:
        UsageError: there is none of that name, it has no such number, or the number cannot be.
    """
    known = options_of(name)
    given = {key: value for key, value in options.items() if value is not None}
    if unknown := sorted(given.keys() - known):
        raise UsageError(f"optimizer={name!r} does not take {', '.join(unknown)}; it takes {', '.join(sorted(known))}")
    try:
        return OPTIMIZERS[name](kernels, **given)
    except (TypeError, ValueError) as error:
        raise UsageError(f"optimizer={name!r} cannot be made with {given}: {error}") from None
