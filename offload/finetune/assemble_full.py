"""Training of all parameters, of a checkpoint or of a module in memory: what `assemble` needs of either."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offload.checkpoint import Opened, find, open_checkpoint
from offload.errors import BudgetError
from offload.finetune.accelerator import Accelerator
from offload.finetune.assemble import assemble
from offload.finetune.choice import Choice, told
from offload.finetune.export import export_checkpoint, export_module
from offload.finetune.forecast import forecast
from offload.finetune.glance import glance
from offload.finetune.memory import Wishes
from offload.finetune.pricing import Batch
from offload.finetune.subject import Subject, Weights
from offload.finetune.trainer import Trainer
from offload.hardware import rss_bytes
from offload.io.engine import Engine
from offload.kernels.chosen import Kernels
from offload.optim.base import Optimizer
from offload.profile import load_profile, preset
from offload.runtime.discovery import dissect
from offload.specs import Budgets
from offload.tiers.transit import bring_into


def assemble_full(
    model: str | os.PathLike[str] | nn.Module,
    rule: Optimizer,
    engine: Engine,
    kernels: Kernels,
    *,
    dtype: str | torch.dtype,
    model_kwargs: Mapping[str, Any],
    budgets: Budgets,
    wishes: Wishes,
    max_grad_norm: float | None,
    tokens: int,
    accelerator: Accelerator | None,
    update_share: float | None,
    **options: Any,
) -> Trainer:
    """A trainer of all parameters.

    Args:
        update_share: of the updates that the accelerator makes; None: what makes a step shortest.
        options: as for `assemble`, like the others.

    Raises:
        see `assemble`.
    """
    choice = Choice(update_share=update_share or 0.0)
    if isinstance(model, nn.Module):
        subject = _module(model, engine)
    else:
        opened = open_checkpoint(find(model), engine, dtype=dtype, **model_kwargs)
        subject = _checkpoint(opened, engine)
        choice = told() or _chosen(
            opened, rule, max_grad_norm, budgets.cpu_memory, tokens, accelerator, wishes, update_share
        )  # fmt: skip
        if accelerator is not None:
            accelerator = accelerator.sized(opened.spec, tokens)
    return assemble(
        subject, rule, engine, kernels, max_grad_norm=max_grad_norm, cpu_memory=budgets.cpu_memory, wishes=wishes,
        choice=choice, accelerator=accelerator, **options,
    )  # fmt: skip


def _module(root: nn.Module, engine: Engine) -> Subject:
    """A module that is in memory, and gets the last weights in the end."""
    anatomy = dissect(root, shares=False)
    given = {n: p for n, o in anatomy.owners.items() if (p := o[0].module._parameters[o[0].attribute]) is not None}

    def fill(views: Weights) -> None:
        for name, view in views.items():
            view.copy_(given[name].detach())

    def put_back(weights: Weights) -> None:
        for name, parameter in given.items():
            parameter.data.copy_(weights[name])

    return Subject(
        root=root,
        anatomy=anatomy,
        parameters={n: (p.dtype, tuple(p.shape)) for n, p in given.items()},
        fill=fill,
        save=lambda _, folder: export_module(root, folder, engine),
        put_back=put_back,
    )


def _checkpoint(opened: Opened, engine: Engine) -> Subject:
    """A checkpoint, which is read once and written elsewhere."""

    def save(views: Weights, folder: Path) -> None:
        export_checkpoint(opened.model, opened.sources, opened.checkpoint.entries, views, folder, engine)

    return Subject(
        root=opened.model,
        anatomy=dissect(opened.model, shares=False),
        parameters={n: (s.dtype, s.shape) for n, s in opened.sources.items()},
        fill=lambda views: bring_into(views, opened.sources, engine),
        save=save,
    )


def _chosen(
    opened: Opened,
    rule: Optimizer,
    max_grad_norm: float | None,
    budget: int,
    tokens: int,
    accelerator: Accelerator | None,
    wishes: Wishes,
    update_share: float | None,
) -> Choice:
    """What is best by the prediction of a step, after a look at the machine."""
    spec, base = opened.spec, rss_bytes()
    profile = load_profile(opened.checkpoint.directory) or preset("cpu-ddr5-nvme4")
    if rule.cost.state_bytes * spec.params > budget - base:  # else the disk is hardly used, and nothing to choose
        profile = glance(profile, spec, tokens, max(opened.checkpoint.files, key=os.path.getsize))
    batch = Batch(rows=1, tokens=tokens)
    if accelerator is not None and not accelerator.is_known(profile):
        return Choice(update_share=update_share or 0.0)
    try:
        return forecast(
            spec,
            rule,
            profile,
            batch=batch,
            clips=max_grad_norm is not None,
            budget=budget,
            base=base,
            accelerator=accelerator,
            wishes=wishes,
            update_share=update_share,
        ).choice
    except BudgetError:  # what does not fit is said later, by what is measured
        return Choice(update_share=update_share or 0.0)
