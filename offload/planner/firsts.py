"""What products take in a first pass beyond later ones: a library makes a kernel for each number of rows it meets.

torch's products on the CPU are oneDNN's, which makes machine code for a shape when it meets it; ours are made already.
Of a mixture whose experts torch multiplies, every expert may get another number of rows.
"""

from __future__ import annotations

from offload.planner.experts import different_rows
from offload.planner.ops import VERY_FEW, OpCosts, Phase
from offload.specs import ModelSpec, TensorSpec

MANY = 8  # rows from which our kernels multiply again; torch does what lies between (runtime/linears.py)


def first_s(spec: ModelSpec, phase: Phase, ops: OpCosts) -> float:
    """Seconds that making kernels takes in the first pass of a process."""
    by_torch, by_ours = ops.profile.cost("first_torch"), ops.profile.cost("first")
    seconds = 0.0
    for tensor, rows in _different(spec, phase).items():
        if tensor.experts and ops.of_groups(tensor.format) != "cpu":
            made = different_rows(tensor.experts, tensor.chosen, rows, spec.kv_layers or 1, lambda n: n > VERY_FEW)
            seconds += made * by_torch
        elif not tensor.experts and rows > VERY_FEW:
            is_torchs = ops.exact or tensor.is_transposed or rows < MANY
            seconds += by_torch if is_torchs else by_ours
    return seconds


def _different(spec: ModelSpec, phase: Phase) -> dict[TensorSpec, int]:
    """One matrix of each shape, with the rows that it is multiplied by."""
    found: dict[tuple[object, ...], tuple[TensorSpec, int]] = {}
    for unit in spec.units:
        rows = phase.sequences if unit.is_head else phase.rows
        for t in unit.tensors:
            if t.width and not t.is_table:
                found.setdefault((t.elements, t.width, t.is_transposed, t.experts, rows), (t, rows))
    return dict(found.values())
