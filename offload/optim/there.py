"""Optimizers on an accelerator: which updates it has a kernel for, and the optimizer that uses it."""

from __future__ import annotations

import copy

from offload.kernels import OPS
from offload.kernels.chosen import Kernels
from offload.optim.adamw import AdamW
from offload.optim.base import Optimizer


def why_not_there(rule: Optimizer) -> str | None:
    """Why an accelerator cannot make an optimizer's updates; None where it can."""
    if rule.cost.op is not None and "gpu" in OPS[rule.cost.op]:
        return None
    return f"optimizer={rule.name!r} has no kernel for accelerators, so that the CPU makes its updates; adamw has one"


def on_device(rule: Optimizer, kernels: Kernels) -> Optimizer:
    """The same optimizer, with the kernels of an accelerator. `why_not_there` has nothing against it."""
    assert isinstance(rule, AdamW)
    assert why_not_there(rule) is None
    made = copy.copy(rule)
    made._kernels = kernels
    return made
