"""Puts a trainer of adapters together: frozen weights in memory as far as they fit, the rest streaming twice a step."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from math import prod
from typing import Any

from offload.checkpoint import Opened
from offload.checkpoint.fingerprint import fingerprint
from offload.finetune.accelerator import GRADIENTS, Accelerator
from offload.finetune.assemble import SLOTS, assemble
from offload.finetune.lora import A, B, Lora, adapt, begin, save_adapters
from offload.finetune.room import backward_nbytes, place_beside, spec_of, step_nbytes
from offload.finetune.trainer import Trainer
from offload.io.engine import Engine
from offload.kernels.chosen import Kernels
from offload.optim.base import Optimizer
from offload.runtime.discovery import dissect
from offload.runtime.linears import unpack_nbytes
from offload.runtime.streams import Streams
from offload.runtime.warmup import compile_kernels
from offload.specs import Budgets
from offload.tiers.cells import SHARD_COUNT, lay_out_cell, page
from offload.tiers.device import Device
from offload.tiers.devices import create


def assemble_lora(
    opened: Opened,
    lora: Lora,
    rule: Optimizer,
    engine: Engine,
    kernels: Kernels,
    *,
    budgets: Budgets,
    tokens: int,
    seed: int,
    accelerator: Accelerator | None = None,
    **options: Any,
) -> Trainer:
    """A trainer of adapters. The checkpoint's weights stay as they are, packed ones too.

    Args:
        budgets: for the process, and for the frozen weights.
        tokens: of a micro-batch.
        accelerator: what computes; None: the CPU.
        options: as for `assemble.assemble`.

    Raises:
        BudgetError, ModelError, UsageError, StorageError, CheckpointError: see offload.errors.
    """
    root, sources = opened.model, opened.sources
    targets = adapt(root, lora)
    anatomy = dissect(root, shares=False)
    shapes = {n: (p.dtype, tuple(p.shape)) for n, p in root.named_parameters() if n.rpartition(".")[2] in (A, B)}
    there_kernels = kernels if accelerator is None else Kernels(accelerator.kind, exact=kernels.exact)
    compile_kernels(there_kernels, sources.values())
    spec = spec_of(anatomy, sources, getattr(root, "config", None), by_rows=True)
    count = sum(prod(shape) for _, shape in shapes.values())
    state = rule.state_nbytes((min(count, SLOTS * SHARD_COUNT),))
    computing = step_nbytes(spec, tokens) | backward_nbytes(spec, tokens)
    computing["weights as they are unpacked"] = 2 * unpack_nbytes(sources.values(), exact=True)
    beside = {"adapters and the ring of their state": sum(d.itemsize * prod(s) for d, s in shapes.values()) + state}
    device: Device | None = None
    with ExitStack() as undone:  # closed again if there will be no trainer to own it
        if accelerator is None:
            placement = place_beside(spec, budgets, computing | beside)
        else:
            cells = [lay_out_cell(u.name, {n: shapes[n] for n in u.tensors if n in shapes}) for u in anatomy.units]
            sizes = [page(cell.nbytes) for cell in cells]
            computing["adapters and the gradients of a unit's"] = sum(sizes) + GRADIENTS * max(sizes)
            placement = place_beside(spec, budgets, beside, computing)
            room = accelerator.memory - sum(computing.values()) + sum(sizes)
            device = create(accelerator.name, memory_nbytes=room, link_bytes_per_s=accelerator.link_bytes_per_s)
            undone.callback(device.close)
            accelerator = replace(accelerator, device=device, activations=computing)
        streams = Streams(anatomy, sources, placement, engine, there_kernels, device=device)
        undone.callback(streams.close)
        streams.fill()
        trainer = assemble(
            root, anatomy, shapes, rule, engine, kernels,
            fill=lambda views: begin(views, seed), streams=streams, travels=False,
            save=lambda views, folder: save_adapters(root, lora, targets, views, folder, engine),
            seed=seed, cpu_memory=budgets.cpu_memory, accelerator=accelerator, **options,
            belongs={"adapters": lora.adds, "checkpoint": fingerprint(opened.checkpoint)},
        )  # fmt: skip
        undone.pop_all()
    return trainer
