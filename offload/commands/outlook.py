"""The plan of a fine-tuning run, from its configuration and the checkpoint's headers alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from offload.budgets import resolve
from offload.checkpoint.outline import Outline, outline
from offload.errors import BudgetError
from offload.finetune.accelerator import Accelerator
from offload.finetune.assemble_zeroth import place_zeroth
from offload.finetune.config import Config
from offload.finetune.copies import Copies, copies
from offload.finetune.forecast import Batch, Forecast, forecast
from offload.finetune.outlook import Outlook, foresee
from offload.io.safetensors import read_checkpoint
from offload.kernels.chosen import Kernels
from offload.optim import make
from offload.plan.machine import machine
from offload.plan.process import process_nbytes
from offload.profile import Profile
from offload.runtime.discovery import dissect
from offload.specs import ModelSpec
from offload.tiers.devices import full_name, parse_link
from offload.units import parse_bytes


def outlook_of(config: Config, directory: Path, steps: int, hardware: str | None = None) -> Outlook:
    """The plan of a run, from the checkpoint's headers alone.

    Args:
        steps: of the run; 0 when nobody has counted.
        hardware: a profile's file or a preset; None: this machine.
    """
    sketch = outline(directory, read_checkpoint(directory))
    outlook = foresee(config, sketch.spec, steps)
    if config.method == "full":
        outlook = replace(outlook, forecast=_forecast(config, sketch.spec, machine(hardware, directory)))
    if config.method == "zo":
        outlook = replace(outlook, copies=_copies(config, sketch, steps))
    return outlook


def _forecast(config: Config, spec: ModelSpec, profile: Profile) -> Forecast | None:
    """A step on a machine, by method full."""
    train = config.train
    batch = Batch(
        rows=train.per_device_train_batch_size,
        tokens=config.data.max_length,
        micro_batches=train.gradient_accumulation_steps,
    )
    rule = make(train.optim, Kernels("cpu", exact=False), **train.optim_args)
    asked = config.budgets
    device = full_name(asked.device)
    budgets = resolve(cpu_memory=asked.cpu_memory, gpu_memory=asked.gpu_memory, device=device)
    accelerator: Accelerator | None = None
    if budgets.gpu_memory is not None:
        link = parse_link(asked.link, device)
        accelerator = Accelerator(name=device, memory=budgets.gpu_memory, link_bytes_per_s=link)
        if not accelerator.is_known(profile):
            return None
    try:
        return forecast(
            spec, rule, profile, batch=batch, clips=bool(train.max_grad_norm), budget=budgets.cpu_memory,
            base=process_nbytes(exact=False), accelerator=accelerator,
        )  # fmt: skip
    except BudgetError:  # the trainer measures, and says what does not fit
        return None


def _copies(config: Config, sketch: Outline, steps: int) -> Copies:
    """What method zo writes of weights."""
    asked, anatomy = config.budgets, dissect(sketch.model, shares=False)
    budgets = resolve(cpu_memory=asked.cpu_memory, gpu_memory=asked.gpu_memory, device=full_name(asked.device))
    try:
        placement = place_zeroth(
            sketch.model, anatomy, sketch.sources, budgets, tokens_of(config), process_nbytes(exact=False)
        )
    except BudgetError:  # the trainer says what does not fit
        return Copies()
    streamed = sum(sketch.sources[t.name].nbytes for ts in placement.bundles.values() for t in ts)
    found = copies(streamed, sketch.spec.nbytes - streamed, steps=steps, every=config.zo.write_every)
    limit = asked.disk_limit
    return found if limit is None else replace(found, disk_nbytes=min(found.disk_nbytes, parse_bytes(limit, "limit")))


def tokens_of(config: Config) -> int:
    """Of a micro-batch, at most."""
    train = config.train
    return max(train.per_device_train_batch_size, train.per_device_eval_batch_size or 0) * config.data.max_length
