"""Where frozen weights live beside adapters that are trained, and what else a step takes of each memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from offload.errors import BudgetError
from offload.finetune.accelerator import GRADIENTS
from offload.finetune.activations import RING
from offload.finetune.choice import SLOTS
from offload.finetune.lora import A, B
from offload.finetune.room import backward_nbytes, place_beside, spec_of, step_nbytes
from offload.optim.base import Optimizer
from offload.planner.placement import Placement
from offload.runtime.discovery import Anatomy
from offload.runtime.linears import unpack_nbytes
from offload.specs import Budgets, ModelSpec
from offload.tiers.cells import SHARD_COUNT, Shapes, lay_out_cell, page
from offload.tiers.layout import Source


@dataclass(frozen=True, kw_only=True)
class LoraPlace:
    """Attributes:
    spec: the frozen weights.
    shapes: of adapters, by name.
    cells: unit -> bytes of its adapters.
    params: unit -> their number.
    adapted: unit -> (outputs, inputs) of the matrices that have one.
    placement: of the frozen weights.
    step: what a step takes where the model computes, by purpose.
    beside: what else main memory holds.
    """

    spec: ModelSpec
    shapes: Shapes
    cells: Mapping[str, int]
    params: Mapping[str, int]
    adapted: Mapping[str, tuple[tuple[int, int], ...]]
    placement: Placement
    step: Mapping[str, int]
    beside: Mapping[str, int]


def place_lora(
    root: Any,
    anatomy: Anatomy,
    sources: Mapping[str, Source],
    rule: Optimizer,
    budgets: Budgets,
    tokens: int,
    waiting: int,
    base_nbytes: int | None = None,
) -> LoraPlace:
    """Plans memory.

    Args:
        root: the model, with its adapters.
        anatomy: from `dissect(root, shares=False)`.
        sources: of the frozen weights.
        rule: the optimizer.
        tokens: of a micro-batch.
        waiting: micro-batches whose inputs of units wait in memory from forward to backward; 0: they wait on disk.
        base_nbytes: see `place_beside`.

    Raises:
        BudgetError: not even the rings fit.
    """
    shapes = {n: (p.dtype, tuple(p.shape)) for n, p in root.named_parameters() if n.rpartition(".")[2] in (A, B)}
    spec = spec_of(anatomy, sources, getattr(root, "config", None), by_rows=True)
    count = sum(prod(shape) for _, shape in shapes.values())
    state = rule.state_nbytes((min(count, SLOTS * SHARD_COUNT),))
    step = step_nbytes(spec, tokens) | backward_nbytes(spec, tokens)
    step["weights as they are unpacked"] = 2 * unpack_nbytes(sources.values(), exact=True)
    beside = {"adapters and the ring of their state": sum(d.itemsize * prod(s) for d, s in shapes.values()) + state}
    laid = [lay_out_cell(u.name, {n: shapes[n] for n in u.tensors if n in shapes}) for u in anatomy.units]
    cells = {cell.unit: page(cell.nbytes) for cell in laid}
    inputs = step["inputs of units"]
    if budgets.gpu_memory is None:
        step["inputs of units"] = inputs * waiting or RING
        try:
            placement = place_beside(spec, budgets, step | beside, base_nbytes=base_nbytes)
        except BudgetError:  # some go to disk, as memory runs short
            step["inputs of units"] = inputs
            placement = place_beside(spec, budgets, step | beside, base_nbytes=base_nbytes)
    else:
        beside["inputs of units that the accelerator has no room for"] = inputs * (waiting - 1) if waiting else RING
        step["adapters and the gradients of a unit's"] = sum(cells.values()) + GRADIENTS * max(cells.values())
        placement = place_beside(spec, budgets, beside, step, base_nbytes=base_nbytes)
    of = {n.removesuffix(A): shape[1] for n, (_, shape) in shapes.items() if n.endswith(A)}
    adapted = {u.name: tuple((shapes[n + B][1][0], of[n]) for n in of if n + A in u.tensors) for u in anatomy.units}
    params = {u.name: sum(prod(shapes[n][1]) for n in u.tensors if n in shapes) for u in anatomy.units}
    return LoraPlace(
        spec=spec,
        shapes=shapes,
        cells=cells,
        params=params,
        adapted=adapted,
        placement=placement,
        step=step,
        beside=beside,
    )
