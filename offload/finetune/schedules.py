"""Learning rates by step, with transformers' names and numbers (transformers.optimization.get_scheduler)."""

from __future__ import annotations

import math
from collections.abc import Callable

from offload.errors import UsageError

Schedule = Callable[[int, int, int], float]
"""From (steps done, warm-up steps, steps in all) to the factor of the learning rate."""


def _constant(step: int, warmup: int, total: int) -> float:
    return 1.0


def _rise(step: int, warmup: int) -> float:
    return step / max(1, warmup)


def _constant_with_warmup(step: int, warmup: int, total: int) -> float:
    return _rise(step, warmup) if step < warmup else 1.0


def _linear(step: int, warmup: int, total: int) -> float:
    if step < warmup:
        return _rise(step, warmup)
    return max(0.0, (total - step) / max(1, total - warmup))


def _cosine(step: int, warmup: int, total: int) -> float:
    if step < warmup:
        return _rise(step, warmup)
    progress = (step - warmup) / max(1, total - warmup)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * 0.5 * 2.0 * progress)))


SCHEDULES: dict[str, Schedule] = {
    "constant": _constant,
    "constant_with_warmup": _constant_with_warmup,
    "linear": _linear,
    "cosine": _cosine,
}


def warmup_steps(value: float, total: int) -> int:
    """Warm-up in steps: 1 and more is a number of steps, less is a share of all steps, rounded up."""
    return int(value) if value >= 1 else math.ceil(total * value)


def learning_rate(name: str, base: float, step: int, *, warmup: int, total: int) -> float:
    """The rate of the step that follows `step` steps done.

    Raises:
        UsageError: no schedule has this name.
    """
    if name not in SCHEDULES:
        raise UsageError(f"lr_scheduler_type={name!r} is not known; known are {', '.join(SCHEDULES)}")
    return base * SCHEDULES[name](step, warmup, total)
