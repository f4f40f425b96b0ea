"""How much of a checkpoint's weights stays in memory while it is trained, beside all else that a step takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from offload.budgets import DEVICE_SLACK, TRANSIT
from offload.checkpoint.describe import describe
from offload.errors import BudgetError
from offload.hardware import rss_bytes
from offload.planner.placement import Placement, Tier, TooSmall, place
from offload.planner.workspace import LIBRARIES, MARGIN, workspace
from offload.runtime.discovery import Anatomy
from offload.specs import Budgets, ModelSpec, Workload
from offload.tiers.layout import Source
from offload.units import MIB, format_bytes

SLACK = 64 * MIB  # threads of micro-batches and what an allocator keeps between steps
LOSS = 1.5  # of the logits with generation's two float32 copies: what cross entropy over all tokens takes


def spec_of(anatomy: Anatomy, sources: Mapping[str, Source], config: Any, *, by_rows: bool) -> ModelSpec:
    """The model's stored weights as numbers, for training, which keeps no keys and values.

    Args:
        by_rows: whether tables are read by the row.
    """
    here = replace(
        anatomy,
        units=tuple(replace(u, tensors=tuple(n for n in u.tensors if n in sources)) for u in anatomy.units),
        loose=tuple(n for n in anatomy.loose if n in sources),
        tables=anatomy.tables if by_rows else frozenset(),
    )
    return replace(describe(here, sources, config), kv_bytes_per_token=0, kv_layers=0)


def step_nbytes(spec: ModelSpec, tokens: int) -> dict[str, int]:
    """What running one micro-batch forward takes, by purpose."""
    work = workspace(spec, Workload(batch=1, prompt_tokens=tokens, total_tokens=tokens))
    return {
        f"activations ({tokens:,} tokens)": work.activations,
        f"logits and loss ({tokens:,} tokens)": int(LOSS * tokens * spec.logits_nbytes),
    }


def backward_nbytes(spec: ModelSpec, tokens: int) -> dict[str, int]:
    """What a backward pass of one micro-batch takes beside its forward pass, when units run again in it."""
    graph = tokens * (6 * spec.widest_nbytes + 12 * spec.hidden_nbytes)
    return {
        "the graph of a unit": graph,
        "inputs of units": tokens * spec.hidden_nbytes * len(spec.units),
        "gradients of logits": int(LOSS * tokens * spec.logits_nbytes),
    }


def place_beside(
    spec: ModelSpec,
    budgets: Budgets,
    beside: Mapping[str, int],
    there: Mapping[str, int] | None = None,
    base_nbytes: int | None = None,
) -> Placement:
    """Keeps as much as fits, and at most what the budgets ask for.

    Args:
        beside: what else a step takes of main memory, by purpose.
        there: the same of the accelerator's, where weights are brought to one; None: they are used in main memory.
        base_nbytes: what the process takes before any weight; None: what this one takes now.

    Raises:
        BudgetError: not even the ring fits; says which budget would do.
    """
    base = rss_bytes() if base_nbytes is None else base_nbytes
    parts = {"the process itself": base, "libraries and margin": reserve_nbytes(budgets.cpu_memory)} | dict(beside)
    device: int | None = None
    if there is not None:
        assert budgets.gpu_memory is not None
        parts["buffers on the way to the device"] = TRANSIT
        device = budgets.gpu_memory - sum(there.values()) - DEVICE_SLACK * sum(1 + len(u.tensors) for u in spec.units)
    left = budgets.cpu_memory - sum(parts.values())
    target = budgets.resident
    if isinstance(target, float):
        target = int(target * spec.nbytes)
    if target is not None and device is not None:
        target = max(0, target - device)
    try:
        return place(spec, host_nbytes=left, device_nbytes=device, host_target=target)
    except TooSmall as error:
        if error.is_device and there is not None and budgets.gpu_memory is not None:
            raise _too_small(
                "gpu_memory", budgets.gpu_memory, there, budgets.gpu_memory + error.missing, error
            ) from None
        needed = (budgets.cpu_memory * (1 - MARGIN) + error.missing) / (1 - MARGIN) + 8 * MIB
        raise _too_small("cpu_memory", budgets.cpu_memory, parts, int(needed), error) from None


def reserve_nbytes(budget: int) -> int:
    """What is set aside for libraries, threads and allocators."""
    return LIBRARIES + SLACK + int(MARGIN * budget)


def at(spec: ModelSpec, placement: Placement, tier: Tier) -> int:
    """Bytes of weights that live on a tier."""
    every = (*spec.loose, *(t for unit in spec.units for t in unit.tensors))
    return sum(t.nbytes for t in every if placement.home[t.name] is tier)


def check_there(gpu_memory: int, there: Mapping[str, int]) -> None:
    """Raises BudgetError unless all of it fits on the accelerator."""
    if (needed := sum(there.values())) > gpu_memory:
        raise _too_small("gpu_memory", gpu_memory, there, needed, "")


def _too_small(name: str, given: int, parts: Mapping[str, int], needed: int, why: object) -> BudgetError:
    taken = ", ".join(f"{what} {format_bytes(n)}" for what, n in parts.items() if n)
    return BudgetError(
        f"{name}={format_bytes(given)} is too small for this training, which takes there: {taken}. "
        f"{why} Give at least {format_bytes(needed)}, or shorter micro-batches".replace(".  ", ". ")
    )
