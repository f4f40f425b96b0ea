"""What fine-tuning computes, in seconds of one machine: units forward, adapters, and weights that are moved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from offload.planner.ops import OpCosts, Phase
from offload.profile import Profile
from offload.specs import ModelSpec

MOVE_FLOPS = 16.0  # of a weight's direction, with its move: what a kernel's 8.4 billion a second come to on two cores
MOVE_BYTES = 14.0  # of a weight in 16 bits: read, kept, and written to two places that memory reads first


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What a step works on: micro-batches of so many rows of so many tokens."""

    rows: int
    tokens: int
    micro_batches: int = 1

    @property
    def count(self) -> int:
        """Tokens of a micro-batch."""
        return self.rows * self.tokens


@dataclass(frozen=True, slots=True)
class Visit:
    """Seconds of a unit's forward, of all micro-batches: its products with weights, and all else in it."""

    products_s: float = 0.0
    rest_s: float = 0.0

    @property
    def seconds(self) -> float:
        return self.products_s + self.rest_s


def visits(spec: ModelSpec, profile: Profile, batch: Batch, processor: str) -> Mapping[str, Visit]:
    """Every unit's forward by torch's own kernels, which training computes with."""
    ops = OpCosts(profile, processor, exact=True)
    phase = Phase(sequences=batch.rows, tokens=batch.tokens)
    found = {}
    for unit in spec.units:
        # A head makes the logits of all tokens here.
        matrices = [t for t in unit.tensors if t.width and not t.is_table]
        products = sum(ops.matrix(t, t.format or spec.dtype, spec.dtype, phase.rows).seconds for t in matrices)
        rest = profile.cost("unit")
        if unit.layers:
            rest += unit.layers * (ops.attention(spec, phase).seconds + ops.block(spec, phase.rows).seconds)
        found[unit.name] = Visit(products * batch.micro_batches, rest * batch.micro_batches)
    return found


def adapters(
    shapes: Iterable[tuple[int, int]], rank: int, profile: Profile, batch: Batch, processor: str, dtype: str
) -> tuple[float, float]:
    """Seconds that adapters of matrices of these (outputs, inputs) add, forward and backward, of all micro-batches.

    Forward there are two products of the rank, and their result is scaled and added. Backward there are four, and two
    gradients of a matrix's inputs are added.
    """
    ops, rows = OpCosts(profile, processor, exact=True), batch.count
    forward = backward = 0.0
    for outputs, inputs in shapes:
        products = sum(ops.linear(dtype, dtype, *shape, rows).seconds for shape in ((rank, inputs), (outputs, rank)))
        forward += products + _streamed_s(10 * rows * outputs, profile, processor, dtype)
        backward += 2 * products + _streamed_s(rows * (4 * outputs + 6 * inputs), profile, processor, dtype)
    return forward * batch.micro_batches, backward * batch.micro_batches


def move_s(params: int, directions: int, profile: Profile, dtype: str) -> float:
    """Seconds in which the CPU makes both sides of so many weights, the last of the directions theirs, the others
    updates that they lack."""
    if not params:
        return 0.0
    found = profile.op_seconds("move_along", processor="cpu", format=dtype, shape=(directions,), amount=params)
    if found is None:
        flops, nbytes = MOVE_FLOPS * directions * params, MOVE_BYTES * params
        found = profile.roofline(processor="cpu", flops=flops, nbytes=nbytes, dtype="float32")
    return found.seconds


def _streamed_s(nbytes: float, profile: Profile, processor: str, dtype: str) -> float:
    return profile.roofline(processor=processor, flops=0.0, nbytes=nbytes, dtype=dtype).seconds
