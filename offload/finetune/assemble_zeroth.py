"""Puts a zeroth-order trainer together: weights in memory and a log on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path

import torch
from torch import nn

from offload.errors import UsageError
from offload.finetune.assemble import check_memory
from offload.finetune.trainer import Trainer
from offload.io.engine import Engine
from offload.runtime.discovery import Anatomy
from offload.runtime.zeroth import Zeroth
from offload.tiers.cells import Cells, Shapes, lay_out_cell
from offload.tiers.logfile import LogFile


def assemble_zeroth(
    root: nn.Module,
    anatomy: Anatomy,
    parameters: Shapes,
    engine: Engine,
    *,
    fill: Callable[[Mapping[str, torch.Tensor]], None],
    save: Callable[[Mapping[str, torch.Tensor], Path], None],
    learning_rate: float,
    eps: float,
    cpu_memory: int,
    offload_dir: Path,
    seed: int,
    resume: bool,
    overwrite: bool,
) -> Trainer:
    """A zeroth-order trainer: weights in memory, a log on disk. Arguments as for `assemble.assemble`."""
    if not eps > 0:
        raise UsageError(f"eps={eps}: weights are moved by a positive distance")
    layouts = [lay_out_cell("weights", parameters)]
    check_memory(layouts[0].nbytes, 0, cpu_memory)
    identity = {
        "parameters": sum(prod(shape) for _, shape in parameters.values()),
        "dtype": sorted({str(dtype) for dtype, _ in parameters.values()}),
        "optimizer": "zo",
        "seed": seed,
    }
    state = LogFile(offload_dir, identity, resume=resume, overwrite=overwrite)
    cells = Cells(layouts)
    try:
        fill(cells.views)
        training = Zeroth(root, anatomy, cells, state, eps=eps, seed=seed)
    except BaseException:
        state.close()
        raise

    def finish() -> None:
        training.close()
        state.close()
        engine.close()
        cells.close()

    return Trainer(
        root, training, None, engine,
        learning_rate=learning_rate, cpu_memory=cpu_memory, wishes=None,
        save=lambda folder: save(cells.views, folder), finish=finish,
    )  # fmt: skip
