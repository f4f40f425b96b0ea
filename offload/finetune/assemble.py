"""Puts a first-order trainer together: cells for weights, the state file, the lane, and the memory that they take."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext, suppress
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch

from offload.errors import BudgetError, ModelError
from offload.finetune.accelerator import Accelerator
from offload.finetune.activations import prepare, press
from offload.finetune.choice import Choice
from offload.finetune.memory import Wishes, plan_first
from offload.finetune.subject import Subject
from offload.finetune.trainer import Trainer
from offload.io.engine import Engine
from offload.io.heap import share_heap
from offload.kernels.chosen import Kernels
from offload.optim.base import Numbers, Optimizer
from offload.optim.there import on_device
from offload.planner.training import asides
from offload.planner.update_share import spread
from offload.runtime.adapted import Adapted
from offload.runtime.training import Training
from offload.runtime.training_lanes import LOOSE
from offload.runtime.updates_there import ShareThere
from offload.tiers.cells import SHARD_COUNT, Cells, lay_out_cell, page
from offload.tiers.device import Device
from offload.tiers.device_state import SLOTS as STATE_SLOTS
from offload.tiers.device_state import DeviceState
from offload.tiers.pins import Pins
from offload.tiers.spill import Spill
from offload.tiers.statefile import open_state, room
from offload.units import format_bytes

DTYPES = (torch.bfloat16, torch.float32)


def assemble(
    subject: Subject,
    optimizer: Optimizer,
    engine: Engine,
    kernels: Kernels,
    *,
    learning_rate: float,
    max_grad_norm: float | None,
    cpu_memory: int,
    wishes: Wishes,
    offload_dir: Path,
    seed: int,
    resume: bool,
    overwrite: bool,
    choice: Choice,
    accelerator: Accelerator | None = None,
    shard_count: int = SHARD_COUNT,
) -> Trainer:
    """A trainer whose state is new, or that of the last commit.

    Args:
        subject: what is trained.
        choice: how deep the ring of state is, and who writes and updates when.
        accelerator: what computes; None: the CPU.
        shard_count: parameters of a shard.

    Raises:
        BudgetError, ModelError, UsageError, StorageError, CheckpointError: see offload.errors.
    """
    anatomy, parameters = subject.anatomy, subject.parameters
    strange = sorted({str(dtype) for dtype, _ in parameters.values() if dtype not in DTYPES})
    if strange:
        raise ModelError(f"parameters in {', '.join(strange)} cannot be trained; load the model as bfloat16 or float32")
    if not parameters:
        raise ModelError("the model has no parameters, so there is nothing to train")
    loose = [n for n in anatomy.loose if n in parameters]
    groups = {u.name: u.tensors for u in anatomy.units} | ({LOOSE: tuple(loose)} if loose else {})
    layouts = [
        lay_out_cell(
            u, {n: parameters[n] for n in names if n in parameters}, shard_count, whole_rows=optimizer.whole_rows
        )
        for u, names in groups.items()
    ]
    shards = {shard.name: page(optimizer.state_nbytes(shard.shape)) for cell in layouts for shard in cell.shards}
    identity = {
        "parameters": sum(prod(shape) for _, shape in parameters.values()),
        "dtype": sorted({str(dtype) for dtype, _ in parameters.values()}),
        "optimizer": optimizer.name,
        "shard": shard_count,
    } | dict(subject.belongs)
    share_heap()
    _warm(optimizer, kernels)
    going_up: frozenset[str] = frozenset()
    if accelerator is not None:
        cpu_memory += accelerator.host_nbytes
        going_up = spread(((s.name, s.count) for cell in layouts for s in cell.shards), choice.update_share)
        if going_up:
            accelerator = accelerator.updating(max(shards[name] for name in going_up))
    ring = min(choice.slots, len(shards)) * max(shards.values())
    if max_grad_norm is not None:
        largest = max(page(cell.nbytes) for cell in layouts)
        ring += asides(choice.defers, is_beside=accelerator is not None) * largest
    plan = plan_first(layouts, ring, cpu_memory, wishes, travels=subject.travels)

    def checksum(data: torch.Tensor) -> str:
        return str(kernels.run("checksum", data))

    travelling = 0 if all(c.unit in plan.kept for c in layouts) else sum(c.nbytes for c in layouts)
    left = _check_disk(room(shards), travelling, wishes.disk_limit)
    device: Device | None = None
    with ExitStack() as undone:  # the last opened is closed first; nothing is once the trainer owns it
        undone.callback(engine.close)
        state = open_state(offload_dir, engine, shards, identity, checksum, resume=resume, overwrite=overwrite)
        undone.callback(state.close)
        is_new = state.step == 0 and not state.has_commit
        spill = Spill(offload_dir, engine, {c.unit: c.nbytes for c in layouts}, checksum)
        undone.callback(spill.close)
        spill.take_room(c.unit for c in layouts if c.places and c.unit not in plan.kept)
        make = Training if subject.streams is None else partial(Adapted, streams=subject.streams)
        there_kernels = kernels
        if accelerator is not None:
            device, there = accelerator.open(layouts)
            undone.callback(device.close)
            there_kernels = Kernels(device.torch_device.type, exact=kernels.exact)
            share: ShareThere | None = None
            if going_up:
                state_there = DeviceState(device, accelerator.state_nbytes // STATE_SLOTS)
                share = ShareThere(going_up, on_device(optimizer, there_kernels), state_there)
            make = partial(make, device=device, there=there, share=share, overlaps=accelerator.overlaps)
        cells = Cells(layouts, plan.kept, Pins(device))
        training = make(
            subject.root, anatomy, cells, state, spill, optimizer,
            slots=choice.slots, cell_slots=(plan.slots, plan.slot_nbytes), max_grad_norm=max_grad_norm,
            kernels=there_kernels, seed=seed,
        )  # fmt: skip
        undone.callback(training.close)
        training.defer(choice.defers)
        training.warm_updates(Numbers(step=1, learning_rate=0.0))
        if accelerator is not None and device is not None:
            inputs = accelerator.inputs_nbytes()
            press(training.backprop, device, inputs, wishes.activations, offload_dir, engine, left)
        else:
            prepare(training.backprop, wishes.activations, cpu_memory, offload_dir, engine, left)
        if is_new:
            training.create(subject.fill)
        else:
            training.restore()
        undone.pop_all()

    def finish(is_whole: bool) -> None:
        with ExitStack() as closing:  # the last one first, and all of them whatever fails
            closing.callback(cells.close)
            closing.callback(engine.close)
            closing.callback(state.close)
            if device is not None:
                closing.callback(_close, device, is_whole)
            closing.callback(training.close)
            if subject.put_back is not None and is_whole:
                subject.put_back(training.present)

    return Trainer(
        subject.root, training, optimizer, engine,
        learning_rate=learning_rate, cpu_memory=cpu_memory, wishes=wishes, travels=subject.travels,
        save=lambda folder: subject.save(training.weights, folder), finish=finish,
    )  # fmt: skip


def _close(device: Device, is_whole: bool) -> None:
    with nullcontext() if is_whole else suppress(Exception):  # one that has failed would say so again
        device.close()


def _warm(optimizer: Any, kernels: Kernels) -> None:
    """Compiles what a step needs, before memory is counted: compilers are large, and stay in the process."""
    for dtype in DTYPES:
        cell = torch.zeros(32, 32, dtype=dtype) if optimizer.whole_rows else torch.zeros(1024, dtype=dtype)
        state = torch.zeros(optimizer.state_nbytes(tuple(cell.shape)), dtype=torch.uint8)
        optimizer.start(state, cell)
        optimizer.step(state, cell, Numbers(step=1, learning_rate=0.0), decays=True)
        kernels.run("square_sum", cell.view(-1))
    kernels.run("checksum", torch.zeros(4096, dtype=torch.uint8))


def _check_disk(state: int, travelling: int, limit: int | None) -> int | None:
    """What is left of the limit when state and weights that travel are there."""
    if limit is None:
        return None
    if state + travelling > limit:
        raise BudgetError(
            f"disk_limit={format_bytes(limit)} is too small: optimizer state, in two slots, takes {format_bytes(state)}"
            f", and weights that do not fit in memory {format_bytes(travelling)}. Raise it, or take an optimizer with "
            "less state: adamw_8bit has half, adafactor a third"
        )
    return limit - state - travelling
