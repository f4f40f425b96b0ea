"""Puts a trainer of adapters together: frozen weights in memory as far as they fit, the rest streaming twice a step."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from offload.checkpoint import Opened
from offload.checkpoint.fingerprint import fingerprint
from offload.finetune.accelerator import Accelerator
from offload.finetune.assemble import assemble
from offload.finetune.choice import Choice
from offload.finetune.lora import Lora, adapt, begin, save_adapters
from offload.finetune.place_lora import place_lora
from offload.finetune.subject import Subject
from offload.finetune.trainer import Trainer
from offload.io.engine import Engine
from offload.kernels.chosen import Kernels
from offload.optim.base import Optimizer
from offload.runtime.discovery import dissect
from offload.runtime.streams import Streams
from offload.runtime.warmup import compile_kernels
from offload.specs import Budgets
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
    micro_batches: int,
    seed: int,
    accelerator: Accelerator | None = None,
    **options: Any,
) -> Trainer:
    """A trainer of adapters. The checkpoint's weights stay as they are, packed ones too.

    Args:
        budgets: for the process, and for the frozen weights.
        tokens: of a micro-batch.
        micro_batches: of a step.
        accelerator: what computes; None: the CPU.
        options: as for `assemble.assemble`.

    Raises:
        BudgetError, ModelError, UsageError, StorageError, CheckpointError: see offload.errors.
    """
    root, sources = opened.model, opened.sources
    targets = adapt(root, lora)
    anatomy = dissect(root, shares=False)
    there_kernels = kernels if accelerator is None else Kernels(accelerator.kind, exact=kernels.exact)
    compile_kernels(there_kernels, sources.values())
    waiting = 0 if options["wishes"].activations == "disk" else micro_batches
    place = place_lora(root, anatomy, sources, rule, budgets, tokens, waiting)
    device: Device | None = None
    with ExitStack() as undone:  # closed again if there will be no trainer to own it
        if accelerator is not None:
            room = accelerator.memory - sum(place.step.values()) + sum(place.cells.values())
            device = create(accelerator.name, memory_nbytes=room, link_bytes_per_s=accelerator.link_bytes_per_s)
            undone.callback(device.close)
            accelerator = replace(accelerator, device=device, activations=place.step)
        streams = Streams(anatomy, sources, place.placement, engine, there_kernels, device=device)
        undone.callback(streams.close)
        streams.fill()
        subject = Subject(
            root=root,
            anatomy=anatomy,
            parameters=place.shapes,
            fill=lambda views: begin(views, seed),
            save=lambda views, folder: save_adapters(root, lora, targets, views, folder, engine),
            streams=streams,
            belongs={"adapters": lora.adds, "checkpoint": fingerprint(opened.checkpoint)},
        )
        trainer = assemble(
            subject, rule, engine, kernels,
            seed=seed, cpu_memory=budgets.cpu_memory, choice=Choice(), accelerator=accelerator, **options,
        )  # fmt: skip
        undone.pop_all()
    return trainer
