"""Optimizers on an accelerator: which updates it has a kernel for, and the optimizer that uses it."""

from __future__ import annotations

import copy

import torch

from offload.kernels import OPS, choose
from offload.kernels.chosen import Kernels
from offload.optim.adamw import AdamW
from offload.optim.base import Optimizer


def why_not_there(rule: Optimizer) -> str | None:
    """Why an accelerator cannot make an optimizer's updates; None where it can."""
    if rule.cost.op is not None and "gpu" in OPS[rule.cost.op]:
        return None
    return f"optimizer={rule.name!r} has no kernel for accelerators, so that the CPU makes its updates; adamw has one"


def why_not_on(rule: Optimizer, kind: str) -> str | None:
    """Why an accelerator of this machine cannot run that kernel; None where it can, or is not to be found here.

    torch's own ops make copies of a shard, for which nobody has set a card's memory aside.

    Args:
        kind: a torch device's type: "cuda", or "cpu" for an emulated accelerator.
    """
    if kind != "cuda" or rule.cost.op is None or not torch.cuda.is_available():
        return None
    choice = choose(rule.cost.op, kind)
    if choice.implementation != "torch":
        return None
    return f"the kernel for updates there does not run ({choice.why}), so that the CPU makes them"


def on_device(rule: Optimizer, kernels: Kernels) -> Optimizer:
    """The same optimizer, with the kernels of an accelerator. `why_not_there` has nothing against it."""
    assert isinstance(rule, AdamW)
    assert why_not_there(rule) is None
    made = copy.copy(rule)
    made._kernels = kernels
    return made
