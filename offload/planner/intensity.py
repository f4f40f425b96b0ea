"""How much a unit's forward computes and moves: operations and bytes of memory, the two sides of a roofline.

Counted is what no implementation can leave out: two operations for each weight and row, weights read once a pass, and
attention's products with the keys and values that it reads (Williams, Waterman and Patterson 2009, "Roofline").
"""

from __future__ import annotations

from dataclasses import dataclass

from offload.planner.ops import Phase
from offload.specs import ModelSpec, TensorSpec, UnitSpec


@dataclass(frozen=True, slots=True)
class Intensity:
    """Of one forward.

    Attributes:
        flops: operations.
        nbytes: of weights, keys and values that are read.
    """

    flops: float
    nbytes: float


def intensity(unit: UnitSpec, spec: ModelSpec, phase: Phase) -> Intensity:
    """Of one unit in one phase. Tables, of which only rows are gathered, count as nothing."""
    rows = phase.sequences if unit.is_head else phase.rows
    flops = nbytes = 0.0
    for tensor in unit.tensors:
        if tensor.is_table:
            continue
        part = _touched(tensor, rows)
        nbytes += tensor.nbytes * part
        if tensor.width:
            chosen = tensor.chosen / tensor.experts if tensor.experts else 1.0
            flops += 2.0 * tensor.elements * chosen * rows
    if unit.layers and spec.kv_layers:
        seen = phase.past + phase.tokens
        flops += 4.0 * unit.layers * spec.heads * spec.head_dim * phase.rows * (phase.past + (phase.tokens + 1) / 2)
        nbytes += unit.layers * spec.kv_bytes_per_token / spec.kv_layers * phase.sequences * seen
    return Intensity(flops, nbytes)


def _touched(tensor: TensorSpec, rows: int) -> float:
    """The part of a tensor that is read: of a stack of experts those that some row chooses, if all are as likely."""
    return 1 - (1 - tensor.chosen / tensor.experts) ** rows if tensor.experts else 1.0
