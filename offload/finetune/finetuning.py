"""From a model and what a user asks to a trainer: all parameters, low-rank adapters, or no gradients at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offload.budgets import Size, parse_resident, resolve
from offload.checkpoint import find, open_checkpoint
from offload.errors import StrictError, UsageError
from offload.finetune.accelerator import Accelerator
from offload.finetune.arguments import check_arguments
from offload.finetune.assemble_full import assemble_full
from offload.finetune.assemble_lora import assemble_lora
from offload.finetune.assemble_zeroth import assemble_zeroth
from offload.finetune.lora import Lora
from offload.finetune.memory import Wishes
from offload.finetune.sharing import AUTO, parse_share
from offload.finetune.trainer import Trainer
from offload.io.engine import Engine
from offload.kernels.chosen import Kernels
from offload.optim import make as make_optimizer
from offload.optim.there import why_not_on
from offload.tiers.devices import create, full_name, warm_up
from offload.tiers.names import parse_link
from offload.units import parse_bytes

THERE = {"lora": ("auto", "recompute", "disk")}  # activations, on an accelerator: graphs would have views of a ring


def finetuning(
    model: str | os.PathLike[str] | nn.Module,
    *,
    method: str = "full",
    lora: Mapping[str, Any] | None = None,
    zo_eps: float = 1e-3,
    zo_write_every: int | None = None,
    zo_sparsity: float = 0.0,
    optimizer: str = "adamw",
    learning_rate: float = 1e-5,
    max_grad_norm: float | None = 1.0,
    weight_decay: float = 0.0,
    betas: tuple[float, float] | None = None,
    eps: float | None = None,
    optimizer_args: Mapping[str, Any] | None = None,
    cpu_memory: Size = None,
    gpu_memory: Size = None,
    offload_dir: str | os.PathLike[str] | None = None,
    device: str | None = None,
    link: str | float | None = None,
    overlap: bool = True,
    update_share: float | str = "auto",
    dtype: str | torch.dtype = "auto",
    seed: int = 0,
    resident: Size = None,
    resident_weights: Size = None,
    tokens: int = 1024,
    micro_batches: int = 1,
    activations: str = "auto",
    disk_limit: Size = None,
    resume: bool = False,
    overwrite: bool = False,
    io: str = "threads",
    strict: bool = False,
    **model_kwargs: Any,
) -> Trainer:
    """A trainer of every parameter of a model, with float32 master weights and optimizer state on disk.

    Results are those of a plain loop that holds everything in memory and computes with the same kernels, bit for bit.

    Args:
        model: a folder with config.json and safetensors, a hub id, or a module on the CPU, which has the trained
            weights when the trainer is closed.
        method: full; lora: low-rank adapters beside frozen weights; or zo: MeZO, two forward passes a step and no
            optimizer, whose state on disk is a log of one number a step.
        zo_eps: how far zo moves weights to each side.
        zo_write_every: steps after which zo writes back the weights that stream; None: as it pays.
        zo_sparsity: share of each parameter's weights, the largest ones, that zo leaves alone (Sparse MeZO).
        lora: r, lora_alpha, lora_dropout and target_modules of the adapters, as PEFT names them.
        optimizer: adamw, adamw_8bit (moments in 8 bits, half the bytes to move), sgd (with momentum 0.9), adafactor or
            apollo (a third of the bytes; see docs/finetuning.md).
        learning_rate: of steps that are not told one.
        max_grad_norm: gradients whose global norm is larger are scaled down to it; None: no clipping.
        weight_decay, betas, eps: of the optimizer; None: its own default. Norms and biases do not decay.
        optimizer_args: other numbers of the optimizer, by name, such as apollo's rank.
        cpu_memory: what the whole process may use, as in "4GiB"; default: what the machine and its cgroup have free.
        gpu_memory: the same for the GPU; default: what it has free.
        offload_dir: a folder on a fast disk for the optimizer's state, which a later run can go on from.
        device: what computes the model: cpu, cuda, cuda:N or emulated; default: cuda when there is one. Updates run on
            the CPU beside it, or a share of them there.
        link: pace of the emulated device's link, as in "8GB/s".
        overlap: an accelerator computes while others move and update; False, one after the other, is for comparing.
        update_share: of the updates that an accelerator makes itself, from 0 to 1, while the CPU makes the others;
            "auto": what is predicted to make a step shortest. With AdamW and method="full" only.
        dtype: of the model's weights: "auto" is the checkpoint's.
        seed: of dropout.
        resident: how much of the optimizer's state stays in memory: "auto", a fraction such as 0.25, or bytes.
        resident_weights: how much of the weights stays in memory, in the same words; the rest streams.
        tokens: of a micro-batch, padding included: what memory is set aside for before the rest is given to weights.
        micro_batches: of a step, for the same purpose, where weights are not trained themselves.
        activations: "auto" keeps those that fit in memory, the others are computed again in the backward pass, from
            inputs of units that wait in memory or, where that is short or the disk has time, on disk; "keep",
            "recompute", "disk". For adapters on an accelerator there is no "keep".
        disk_limit: bytes that state, and what does not fit in memory, may take in offload_dir; default: what is free.
            zo writes no weights back for which there is no room, and applies a longer log.
        resume: go on from the last commit in offload_dir, if there is one.
        overwrite: replace a state that is there.
        io: I/O backend: threads, uring or aiofiles.
        strict: a fall-back to something slower is an error.
        model_kwargs: handed to transformers, such as attn_implementation.

    Raises:
        BudgetError, CheckpointError, ModelError, StorageError, UsageError: see offload.errors.
    """
    check_arguments(
        lora, method=method, zo_eps=zo_eps, zo_write_every=zo_write_every, zo_sparsity=zo_sparsity, optimizer=optimizer,
        learning_rate=learning_rate, max_grad_norm=max_grad_norm, weight_decay=weight_decay, betas=betas, eps=eps,
        update_share=update_share, seed=seed, tokens=tokens, micro_batches=micro_batches, activations=activations,
    )  # fmt: skip
    if lora is not None and method != "lora":
        raise UsageError(f'lora= was given, but method={method!r}; say method="lora"')
    if method == "zo" and activations != "auto":
        raise UsageError(f'activations={activations!r}: method="zo" keeps none, since there is no backward pass')
    device = full_name(device)
    if offload_dir is None:
        raise UsageError("name a folder on a fast disk for the optimizer's state: offload_dir=")
    kernels = Kernels("cpu", exact=False)
    numbers = {"weight_decay": weight_decay, "betas": betas, "eps": eps} | dict(optimizer_args or {})
    rule = make_optimizer(optimizer, kernels, **numbers)
    budgets = resolve(cpu_memory=cpu_memory, gpu_memory=gpu_memory, resident=resident, device=device)
    pace = parse_link(link, device)
    warm_up(device)
    limit = parse_bytes(disk_limit, "disk_limit") if disk_limit is not None else None
    wishes = Wishes(budgets.resident, activations, parse_resident(resident_weights), limit)
    accelerator: Accelerator | None = None
    if budgets.gpu_memory is not None:
        if activations not in THERE.get(method, (activations,)):
            raise UsageError(
                f"activations={activations!r}: with method={method!r} on an accelerator there are "
                + ", ".join(THERE[method])
            )
        accelerator = Accelerator(
            name=device, memory=budgets.gpu_memory, link_bytes_per_s=pace, overlaps=overlap
        )  # fmt: skip
    kind = accelerator.kind if accelerator is not None else "cpu"
    share = parse_share(update_share, method=method, has_device=accelerator is not None, rule=rule, kind=kind)
    why = why_not_on(rule, kind) if update_share == AUTO else None
    if why is not None and strict:
        raise StrictError(f'update_share="auto": {why}; strict mode forbids that the CPU makes all updates. Say 0')
    engine = Engine(io, strict=strict)
    try:
        if method == "lora":
            if isinstance(model, nn.Module):
                raise UsageError('method="lora" takes a checkpoint: a folder or a hub id')
            opened = open_checkpoint(find(model), engine, dtype=dtype, **model_kwargs)
            return assemble_lora(
                opened, Lora(**(lora or {})), rule, engine, kernels,
                learning_rate=learning_rate, max_grad_norm=max_grad_norm,
                budgets=replace(budgets, resident=wishes.weights), wishes=replace(wishes, weights=None), tokens=tokens,
                micro_batches=micro_batches,
                offload_dir=Path(offload_dir), seed=seed, resume=resume, overwrite=overwrite, accelerator=accelerator,
            )  # fmt: skip
        if method == "zo":
            if isinstance(model, nn.Module):
                raise UsageError('method="zo" takes a checkpoint, from which its log goes on: a folder or a hub id')
            read = open_checkpoint(find(model), engine, dtype=dtype, **model_kwargs)
            return assemble_zeroth(
                read, engine, kernels, learning_rate=learning_rate, eps=zo_eps, write_every=zo_write_every,
                sparsity=zo_sparsity, budgets=replace(budgets, resident=wishes.weights), tokens=tokens,
                disk_limit=limit, offload_dir=Path(offload_dir), seed=seed, resume=resume, overwrite=overwrite,
                device=lambda nbytes: create(device, memory_nbytes=nbytes, link_bytes_per_s=pace),
            )  # fmt: skip
        trainer = assemble_full(
            model, rule, engine, kernels, learning_rate=learning_rate, max_grad_norm=max_grad_norm, budgets=budgets,
            wishes=wishes, tokens=tokens, offload_dir=Path(offload_dir), seed=seed, resume=resume, overwrite=overwrite,
            accelerator=accelerator, update_share=share, dtype=dtype, model_kwargs=model_kwargs,
        )  # fmt: skip
        if why is not None:
            trainer.note(why)
        return trainer
    except BaseException:
        engine.close()
        raise
