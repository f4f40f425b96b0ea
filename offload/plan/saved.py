"""A plan as a file (msgpack): what was decided, for which model, and what was predicted."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from offload.budgets import Division
from offload.errors import UsageError
from offload.planner.placement import Placement, Tier
from offload.planner.predict import resident
from offload.specs import ModelSpec, Workload

VERSION = 1
_MOST_NBYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class SavedPlan:
    """What the file holds.

    Attributes:
        version: of this form.
        digest: of the model's tensors and their sizes.
        options: of `offload run`, by name.
        placement: where every tensor lives.
        work: what was asked.
        predicted: what was predicted, as `plan --json` has it.
    """

    version: int
    digest: str
    options: dict[str, Any]
    placement: Placement
    work: Workload
    predicted: dict[str, Any] = field(default_factory=dict)


def digest(spec: ModelSpec) -> str:
    """Of the tensors and their sizes: a saved plan belongs to a model with the same."""
    lines = [f"{t.name} {t.nbytes} {t.read_nbytes}" for t in (*spec.loose, *(t for u in spec.units for t in u.tensors))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def save(plan: SavedPlan, path: str | os.PathLike[str]) -> None:
    """Writes the file whole, or not at all.

    Raises:
        UsageError: it cannot be written.
    """
    target = Path(path)
    part = target.with_name(target.name + ".part")
    try:
        part.write_bytes(msgspec.msgpack.encode(plan))
        part.replace(target)
    except OSError as error:
        raise UsageError(f"the plan {target} cannot be written: {error}") from error


def load_plan(path: str | os.PathLike[str]) -> SavedPlan:
    """Reads one.

    Raises:
        UsageError: it cannot be read, or is no plan of this version.
    """
    file = Path(path)
    try:
        if file.stat().st_size > _MOST_NBYTES:
            raise UsageError(f"{file} is larger than any plan")
        plan = msgspec.msgpack.decode(file.read_bytes(), type=SavedPlan)
    except OSError as error:
        raise UsageError(f"the plan {file} cannot be read: {error}") from error
    except msgspec.MsgspecError as error:
        raise UsageError(f"{file} is no plan: {error}; make one with offload plan -o FILE") from None
    if plan.version != VERSION:
        raise UsageError(f"{file} is a plan of version {plan.version}; this is offload for version {VERSION}")
    return plan


def adopt(plan: SavedPlan, spec: ModelSpec, division: Division) -> Division:
    """A division of memory with the plan's placement instead of its own.

    Raises:
        UsageError: the plan is for another model, or needs more memory than there is.
    """
    if plan.digest != digest(spec):
        raise UsageError("the plan was made for another model, or for other weights; plan again")
    known = {t.name for t in (*spec.loose, *(t for u in spec.units for t in u.tensors))}
    if missing := sorted(known - set(plan.placement.home)):
        raise UsageError(f"the plan says nothing of {missing[0]}; plan again")
    sizes = resident(spec, plan.placement)
    rooms = (
        (Tier.HOST, division.host_nbytes, plan.placement.host_ring.nbytes, "cpu_memory"),
        (Tier.DEVICE, division.device_nbytes or 0, plan.placement.device_ring.nbytes, "gpu_memory"),
    )
    for tier, room, ring, budget in rooms:
        if (need := sizes[tier] + ring) > room and need:
            raise UsageError(
                f"the plan keeps {need:,} bytes of weights and buffers on the {tier}, but {budget} leaves {room:,} for "
                f"them now. It was made for {plan.work.prompt_tokens:,} tokens of a prompt and "
                f"{plan.work.total_tokens:,} in all, and for a process as large as the last run's. Plan again, for as "
                f"many tokens as this run has, or give {need - room:,} bytes more"
            )
    return replace(division, placement=plan.placement)
