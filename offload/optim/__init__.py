"""Optimizers by name. Each is a file of its own that declares what its state costs beside what it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from offload.errors import UsageError
from offload.kernels.chosen import Kernels
from offload.optim.adamw import AdamW
from offload.optim.adamw_8bit import AdamW8bit
from offload.optim.base import Optimizer
from offload.optim.sgd import SGD

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"adamw": AdamW, "adamw_8bit": AdamW8bit, "sgd": SGD}


def make(name: str, kernels: Kernels, **options: Any) -> Optimizer:
    """The optimizer of that name.

    Args:
        options: its numbers; None takes its own default.

    Raises:
        UsageError: there is none of that name, or it has no such number.
    """
    if name not in OPTIMIZERS:
        raise UsageError(f"optimizer={name!r} is not known; there are {', '.join(OPTIMIZERS)}")
    given = {key: value for key, value in options.items() if value is not None}
    try:
        return OPTIMIZERS[name](kernels, **given)
    except TypeError as error:
        raise UsageError(f"optimizer={name!r} does not take all of {', '.join(given)}: {error}") from None
