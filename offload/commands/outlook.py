"""The plan of a fine-tuning run, from its configuration, the checkpoint's headers and what is known of this machine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import prod
from pathlib import Path

from offload.budgets import resolve
from offload.checkpoint.numbers import numbers
from offload.checkpoint.outline import Outline, outline
from offload.checkpoint.skeleton import read_config
from offload.errors import BudgetError
from offload.finetune import glance, small_step
from offload.finetune.accelerator import Accelerator
from offload.finetune.assemble_zeroth import place_zeroth
from offload.finetune.config import Config
from offload.finetune.copies import copies
from offload.finetune.forecast import forecast
from offload.finetune.forecast_lora import forecast_lora
from offload.finetune.forecast_zeroth import forecast_zeroth, moved_by
from offload.finetune.lora import Lora, adapt
from offload.finetune.memory import Wishes
from offload.finetune.outlook import Outlook, foresee
from offload.finetune.place_lora import place_lora
from offload.finetune.pricing import Batch
from offload.finetune.room import spec_of
from offload.finetune.sharing import parse_share
from offload.io.safetensors import read_checkpoint
from offload.kernels.chosen import Kernels
from offload.optim import make
from offload.optim.base import Optimizer
from offload.plan.machine import machine
from offload.plan.process import process_nbytes
from offload.profile import Profile, own_profile
from offload.runtime.discovery import dissect
from offload.runtime.sides import sides_nbytes
from offload.runtime.zeroth import uses
from offload.specs import Budgets, ModelSpec
from offload.tiers.devices import full_name
from offload.tiers.names import parse_link
from offload.units import parse_bytes

SCALED = "products of another model, scaled to this one's shapes"


def outlook_of(config: Config, directory: Path, steps: int, hardware: str | None = None) -> Outlook:
    """The plan of a run, from the checkpoint's headers alone.

    Args:
        steps: of the run; 0 when nobody has counted.
        hardware: a profile's file or a preset; None: this machine.
    """
    known = numbers(directory)
    spec = known.spec
    outlook = replace(foresee(config, spec, steps), notes=known.notes)
    profile, asked = machine(hardware, directory), config.budgets
    device = full_name(asked.device)
    budgets = resolve(cpu_memory=asked.cpu_memory, gpu_memory=asked.gpu_memory, device=device)
    accelerator: Accelerator | None = None
    if budgets.gpu_memory is not None:
        link = parse_link(asked.link, device)
        accelerator = Accelerator(name=device, memory=budgets.gpu_memory, link_bytes_per_s=link)
    is_known = accelerator is None or accelerator.is_known(profile)
    is_own = hardware is not None or own_profile(directory) is not None
    if accelerator is None and not is_own:
        profile = _looked_at(profile, config, spec, directory, budgets.cpu_memory)
    found = _Plan(config, directory, spec, budgets, accelerator, profile, steps, outlook)
    try:
        planned = {"full": found.full, "lora": found.lora, "zo": found.zeroth}[config.method](is_known)
    except BudgetError as error:  # foretold from counts: what is measured says whether that is so
        note = f"a full step is foretold not to fit, so the run may end at its first one: {error}"
        return replace(outlook, notes=(*known.notes, note))
    why = _why(profile, config.model, is_here=hardware is None, is_own=is_own)
    if planned.forecast is None or why is None:
        return planned
    return replace(planned, origin="estimate", notes=(*known.notes, why))


def _why(profile: Profile, model: str, *, is_here: bool, is_own: bool) -> str | None:
    """Why a prediction is an estimate, and what to do about it; None where it rests on what was measured."""
    looks = [text for text in (glance.NOTE, small_step.NOTE) if text in profile.notes]
    if profile.source == "measured" and not is_own and small_step.NOTE not in profile.notes:
        looks.append(SCALED)
    if profile.source == "measured" and not looks:
        return None
    if not is_here:
        return f"the prediction is an estimate: the rates of {profile.name} were not measured here"
    seen = " and ".join(looks) or "a desktop's rates, as this machine was not measured"
    return f"the prediction is an estimate, from {seen}; offload probe {model} measures it"


def _looked_at(profile: Profile, config: Config, spec: ModelSpec, directory: Path, budget: int) -> Profile:
    """This machine with what can be seen of this model in two seconds or three."""
    batch = batch_of(config)
    files = sorted(directory.glob("*.safetensors"), key=lambda f: f.stat().st_size)
    if files and sum(f.stat().st_size for f in files) >= spec.nbytes:  # else there are headers alone
        profile = glance.glance(profile, spec, batch.count, str(files[-1]))
    adapters = partial(adapt, lora=lora_of(config)) if config.method == "lora" else None
    return small_step.with_small_step(
        profile, spec, partial(read_config, directory), batch, method=config.method, budget=budget, adapt=adapters
    )


@dataclass(frozen=True)
class _Plan:
    """What the plan of any method follows from."""

    config: Config
    directory: Path
    spec: ModelSpec
    budgets: Budgets
    accelerator: Accelerator | None
    profile: Profile
    steps: int
    outlook: Outlook

    @cached_property
    def sketch(self) -> Outline:
        """The model's own modules, which take seconds to import: for methods that go by their names."""
        return outline(self.directory, read_checkpoint(self.directory))

    @property
    def batch(self) -> Batch:
        return batch_of(self.config)

    @property
    def rule(self) -> Optimizer:
        train = self.config.train
        return make(train.optim, Kernels("cpu", exact=False), **train.optim_args)

    def full(self, is_known: bool) -> Outlook:
        if not is_known:
            return self.outlook
        found = forecast(
            self.spec, self.rule, self.profile, batch=self.batch, clips=bool(self.config.train.max_grad_norm),
            budget=self.budgets.cpu_memory, base=process_nbytes(exact=False), accelerator=self.accelerator,
            wishes=Wishes(activations=self.config.budgets.activations),
            update_share=parse_share(
                self.config.budgets.update_share, method="full", has_device=self.accelerator is not None,
                rule=self.rule, kind=self.accelerator.kind if self.accelerator is not None else "cpu",
            ),
        )  # fmt: skip
        return replace(self.outlook, forecast=found)

    def lora(self, is_known: bool) -> Outlook:
        config, sketch, base = self.config, self.sketch, process_nbytes(exact=False)
        lora = lora_of(config)
        adapt(sketch.model, lora)
        waiting = 0 if config.budgets.activations == "disk" else self.batch.micro_batches
        anatomy = dissect(sketch.model, shares=False)
        place = place_lora(
            sketch.model, anatomy, sketch.sources, self.rule, self.budgets, tokens_of(config), waiting, base
        )
        if not is_known:
            return self.outlook
        found = forecast_lora(
            sketch.spec, place, self.rule, self.profile, rank=lora.r, batch=self.batch,
            clips=bool(config.train.max_grad_norm), budget=self.budgets.cpu_memory, base=base,
            accelerator=self.accelerator, activations=config.budgets.activations,
        )  # fmt: skip
        return replace(self.outlook, forecast=found)

    def zeroth(self, is_known: bool) -> Outlook:
        config, sketch, base = self.config, self.sketch, process_nbytes(exact=False)
        anatomy, sources = dissect(sketch.model, shares=False), sketch.sources
        placement = place_zeroth(sketch.model, anatomy, sources, self.budgets, tokens_of(config), base)
        streamed = sum(sources[t.name].nbytes for ts in placement.bundles.values() for t in ts)
        written = copies(streamed, sketch.spec.nbytes - streamed, steps=self.steps, every=config.zo.write_every)
        limit = config.budgets.disk_limit
        most = None if limit is None else parse_bytes(limit, "disk_limit")
        if most is not None:
            written = replace(written, disk_nbytes=min(written.disk_nbytes, most))
        outlook = replace(self.outlook, copies=written)
        if not is_known:
            return outlook
        used = uses(anatomy)
        found = forecast_zeroth(
            sketch.spec, spec_of(anatomy, sources, getattr(sketch.model, "config", None), by_rows=False), placement,
            moved_by(used, placement, {n: prod(s.shape) for n, s in sources.items()},
                     {n: s.nbytes for n, s in sources.items()}),
            self.profile, batch=self.batch, steps=self.steps, every=config.zo.write_every,
            writes=most is None or most >= streamed, sides_nbytes=sides_nbytes(used, sources),
            budget=self.budgets.cpu_memory, base=base, accelerator=self.accelerator,
        )  # fmt: skip
        return replace(outlook, forecast=found)


def batch_of(config: Config) -> Batch:
    """Of a step."""
    train = config.train
    return Batch(
        rows=train.per_device_train_batch_size,
        tokens=config.data.max_length,
        micro_batches=train.gradient_accumulation_steps,
    )


def lora_of(config: Config) -> Lora:
    """Adapters as asked for."""
    return Lora(**{name: getattr(config.lora, name) for name in config.lora.__struct_fields__})


def tokens_of(config: Config) -> int:
    """Of a micro-batch, at most."""
    train = config.train
    return max(train.per_device_train_batch_size, train.per_device_eval_batch_size or 0) * config.data.max_length
