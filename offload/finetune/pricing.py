"""What fine-tuning computes, in seconds of one machine: units forward, adapters, and weights that are moved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from offload.planner.ops import OpCosts, Phase
from offload.profile import Profile
from offload.specs import ModelSpec, UnitSpec

# Arithmetic in float32, of kernels that were timed on two cores, as a profile counts it.
MOVE_FLOPS = 17.5  # of a weight, for each direction and once more: 0.21 ns with one, 0.33 with two, 0.97 with eight
MOVE_BYTES = 6.0  # of a weight in 16 bits: read, and written to both sides
LOSS_FLOPS = {True: 130.0, False: 70.0}  # of a logit, learnt from or not; its backward takes double
GRADIENT = 1.3  # of a product: that which makes a matrix's gradient, and writes it. 1.0 to 1.4 as measured
FORWARD, BACKWARD = "unit", "unit_backward"  # tables of whole units, over the tokens of a micro-batch
SUM_BYTES = 10.0  # of a parameter's gradient in 16 bits, added to a sum in 32


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
    """Seconds of a unit's forward, of all micro-batches: its products with weights, and all else in it.

    Attributes:
        seen_s: of its backward, where that was measured, adapters included.
    """

    products_s: float = 0.0
    rest_s: float = 0.0
    seen_s: float | None = None

    @property
    def seconds(self) -> float:
        return self.products_s + self.rest_s

    def backward_s(self, *, trains: bool) -> float:
        """Of its backward, its graph being there: gradients of inputs and, where its matrices are trained, of them."""
        if self.seen_s is not None:
            return self.seen_s
        return self.products_s * (1 + GRADIENT * trains) + 2 * self.rest_s


def visits(
    spec: ModelSpec, profile: Profile, batch: Batch, processor: str, *, learns: bool = True
) -> Mapping[str, Visit]:
    """Every unit's forward by torch's own kernels, which training computes with, and the loss with the head's.

    Args:
        learns: there is a backward pass.
    """
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
        for head in (t for t in matrices if unit.is_head):
            flops = LOSS_FLOPS[learns] * phase.rows * (head.elements // head.width)
            rest += profile.roofline(processor=processor, flops=flops, nbytes=0.0, dtype="float32").seconds
        forward, back = (
            profile.op_seconds(op, processor=processor, format=spec.dtype, shape=kind_of(unit), amount=batch.count)
            for op in (FORWARD, BACKWARD)
        )
        if forward is not None and forward.origin == "table":  # of this very unit
            back_s = back.seconds if back is not None and back.origin == "table" else 0.0
            found[unit.name] = Visit(0.0, forward.seconds * batch.micro_batches, back_s * batch.micro_batches)
        else:
            found[unit.name] = Visit(products * batch.micro_batches, rest * batch.micro_batches)
    return found


def kind_of(unit: UnitSpec) -> tuple[int, ...]:
    """What units that take the same have in common."""
    return unit.layers, int(unit.is_head), *sorted(t.elements for t in unit.tensors)


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
        flops, nbytes = MOVE_FLOPS * (directions + 1) * params, MOVE_BYTES * params
        found = profile.roofline(processor="cpu", flops=flops, nbytes=nbytes, dtype="float32")
    return found.seconds


def sums_s(params: int, profile: Profile, batch: Batch, processor: str) -> float:
    """Seconds in which gradients of so many parameters are added up; a single micro-batch's need not be."""
    if batch.micro_batches == 1:
        return 0.0
    return batch.micro_batches * _streamed_s(SUM_BYTES * params, profile, processor, "float32")


def _streamed_s(nbytes: float, profile: Profile, processor: str, dtype: str) -> float:
    return profile.roofline(processor=processor, flops=0.0, nbytes=nbytes, dtype=dtype).seconds
