"""What an optimizer is to the engine: bytes of state for so many parameters, and one step of them in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


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


class Optimizer(Protocol):
    """Updates runs of parameters, each independently of all others. State is a run of bytes, which the engine stores.

    Attributes:
        name: as users name it.
        state_bytes_per_param: of master weight and state: what is read and written for each parameter in a step.
    """

    name: str
    state_bytes_per_param: float

    def state_nbytes(self, count: int) -> int:
        """Bytes of the state of `count` parameters, a multiple of 256."""

    def start(self, state: torch.Tensor, weights: torch.Tensor) -> None:
        """Writes the state before the first step.

        Args:
            state: uint8 [state_nbytes(count)], of any content.
            weights: [count], in the model's dtype.
        """

    def step(self, state: torch.Tensor, cell: torch.Tensor, numbers: Numbers, *, decays: bool) -> None:
        """One step.

        Args:
            state: changed in place.
            cell: [count], in the model's dtype: the gradient comes in, the new weight goes out.
            decays: whether weight decay applies.
        """

    def weights(self, state: torch.Tensor, cell: torch.Tensor) -> None:
        """Writes the weights that the state holds to `cell`, as `step` rounds them."""
