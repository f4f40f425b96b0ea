"""What an optimizer is to the engine: bytes of state for a shard of parameters, one step of them, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from offload.profile import Profile

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """The numbers of one step.

    Attributes:
        step: which step this is, from 1.
        learning_rate: of this step.
        grad_scale: every gradient is multiplied by it first: the clip factor.
    """

    step: int
    learning_rate: float
    grad_scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a step takes, for each parameter of a large matrix.

    Attributes:
        state_bytes: of master weight and state: what is read and written.
        touched_bytes: moved between processor and main memory.
        flops: arithmetic.
        op: what a machine's profile calls it, where its time is measured; None: memory and arithmetic say it.
    """

    state_bytes: float
    touched_bytes: float
    flops: float
    op: str | None = None

    def seconds(self, params: int, profile: Profile) -> float:
        """Of one step, on the CPU, with gradients and weights in bf16."""
        found = None
        if self.op is not None:
            found = profile.op_seconds(self.op, processor="cpu", format="bfloat16", shape=(), amount=params)
        if found is None:
            flops, nbytes = self.flops * params, self.touched_bytes * params
            found = profile.roofline(processor="cpu", flops=flops, nbytes=nbytes, dtype="float32")
        return found.seconds


class Optimizer(Protocol):
    """Updates shards, each independently of all others. State is a run of bytes, which the engine stores.

    It begins with the float32 master weights, four bytes a parameter: the engine reads these alone where it needs
    weights and no update.

    Attributes:
        name: as users name it.
        cost: what a step takes.
        whole_rows: a shard is whole rows of one matrix, or one vector, and comes in that shape. False: it is a run of
            elements, whatever parameters they are of, a multiple of 256.
    """

    name: str
    cost: Cost
    whole_rows: bool

    def state_nbytes(self, shape: Shape) -> int:
        """Bytes of the state of a shard."""

    def start(self, state: torch.Tensor, weights: torch.Tensor) -> None:
        """Writes the state before the first step.

        Args:
            state: uint8 [state_nbytes(shape)], of any content.
            weights: of that shape, in the model's dtype.
        """

    def step(self, state: torch.Tensor, cell: torch.Tensor, numbers: Numbers, *, decays: bool) -> None:
        """One step.

        Args:
            state: changed in place.
            cell: in the model's dtype: the gradient comes in, the new weight goes out.
            decays: whether weight decay applies.
        """

    def weights(self, state: torch.Tensor, cell: torch.Tensor) -> None:
        """Writes the weights that the state holds to `cell`, as `step` rounds them."""
