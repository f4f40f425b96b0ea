"""Puts a zeroth-order trainer together: weights in memory as far as they fit, the rest streaming, and a log on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import Any

from offload.checkpoint import Opened
from offload.checkpoint.fingerprint import fingerprint
from offload.errors import ModelError
from offload.finetune.assemble import DTYPES
from offload.finetune.export import export_checkpoint
from offload.finetune.room import check_there, place_beside, spec_of, step_nbytes
from offload.finetune.sparse import thresholds
from offload.finetune.trainer import Trainer
from offload.io.engine import Engine
from offload.kernels.chosen import Kernels
from offload.kernels.reference.directions import Along, Sides
from offload.planner.placement import Placement
from offload.runtime.discovery import Anatomy, dissect
from offload.runtime.sides import sides_nbytes
from offload.runtime.zeroth import Zeroth, uses
from offload.specs import Budgets
from offload.tiers.device import Device
from offload.tiers.devices import CpuDevice
from offload.tiers.layout import Source
from offload.tiers.logfile import LogFile

SIDES = "both sides of the largest unit"


def assemble_zeroth(
    opened: Opened,
    engine: Engine,
    kernels: Kernels,
    *,
    learning_rate: float,
    eps: float,
    write_every: int | None,
    sparsity: float,
    budgets: Budgets,
    tokens: int,
    disk_limit: int | None,
    device: Callable[[int], Device] = lambda nbytes: CpuDevice(),
    offload_dir: Path,
    seed: int,
    resume: bool,
    overwrite: bool,
) -> Trainer:
    """A zeroth-order trainer. Arguments as for `finetuning.finetuning`.

    Args:
        device: makes where the model computes, given bytes for weights there.
    """
    root, sources = opened.model, opened.sources
    strange = sorted({str(s.dtype) for s in sources.values() if s.dtype not in DTYPES})
    if strange:
        raise ModelError(f"parameters in {', '.join(strange)} cannot be trained; load the model as bfloat16 or float32")
    if any(s.form is not None for s in sources.values()):
        raise ModelError(
            f"the checkpoint is packed ({opened.weights}), and packed weights cannot move; take the plain one"
        )
    anatomy = dissect(root, shares=False)
    _warm(kernels)
    identity = {
        "parameters": sum(prod(s.shape) for s in sources.values()),
        "dtype": sorted({str(s.dtype) for s in sources.values()}),
        "optimizer": "zo",
        "seed": seed,
        "sparsity": sparsity,
        "checkpoint": fingerprint(opened.checkpoint),
    }
    state = LogFile(offload_dir, identity, resume=resume, overwrite=overwrite)
    with ExitStack() as undone:  # closed again if there will be no trainer to own it
        undone.callback(state.close)
        found = dict(sources)
        for base in state.bases:
            base.verify(state.folder, engine, lambda d: str(kernels.run("checksum", d)))
            found |= base.sources(state.folder, sources)
        if sparsity and "limits" not in state.facts:
            found_limits = thresholds(sources, sparsity, engine)
            state.facts["limits"] = {n: limit.hex() for n, limit in found_limits.items()}
        limits = {n: float.fromhex(limit) for n, limit in state.facts.get("limits", {}).items()}
        placement = place_zeroth(root, anatomy, found, budgets, tokens)
        where = device(sides_nbytes(uses(anatomy), found))
        undone.callback(where.close)
        training = Zeroth(
            root, anatomy, found, placement, engine, kernels, state,
            eps=eps, seed=seed, limits=limits, write_every=write_every, disk_limit=disk_limit,
            device=where,
        )  # fmt: skip
        undone.pop_all()

    def save(folder: Path) -> None:
        export_checkpoint(root, sources, opened.checkpoint.entries, training.weights, folder, engine)

    def finish(_: bool) -> None:
        with ExitStack() as last:  # in the opposite order, whatever fails on the way
            for close in (engine.close, state.close, training.close):
                last.callback(close)

    return Trainer(
        root, training, None, engine,
        learning_rate=learning_rate, cpu_memory=budgets.cpu_memory, wishes=None, save=save, finish=finish,
    )  # fmt: skip


def place_zeroth(
    root: Any,
    anatomy: Anatomy,
    sources: Mapping[str, Source],
    budgets: Budgets,
    tokens: int,
    base_nbytes: int | None = None,
) -> Placement:
    """Where weights live. Arguments as for `place_beside`.

    Raises:
        BudgetError: not even the ring fits, or what a step takes on an accelerator.
    """
    spec = spec_of(anatomy, sources, getattr(root, "config", None), by_rows=False)
    sides = {SIDES: sides_nbytes(uses(anatomy), sources)}
    step = step_nbytes(spec, tokens)
    if budgets.gpu_memory is None:
        return place_beside(spec, budgets, step | sides, base_nbytes=base_nbytes)
    check_there(budgets.gpu_memory, step | sides)
    return place_beside(spec, budgets, sides, base_nbytes=base_nbytes)


def _warm(kernels: Kernels) -> None:
    """Compiles what a step needs, before memory is counted."""
    import torch

    for dtype in DTYPES:
        some = torch.zeros(256, dtype=dtype)
        kernels.run("move_along", some, Along(0, ""), [(1, 0.0)], some, Sides(1, 0.0, some.clone(), some.clone()))
    kernels.run("checksum", torch.zeros(4096, dtype=torch.uint8))
