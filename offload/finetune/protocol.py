"""What a trainer is to the loop in front of it: micro-batches in, a step's facts out, commits that a kill survives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from offload.runtime.streams import Whereabouts

MicroBatch = Mapping[str, torch.Tensor]
"""What the model is called with, together with `use_cache=False`, B rows of T tokens:

    input_ids     int64 [B, T]    rows that are shorter are padded on the right
    labels        int64 [B, T]    the same ids, not shifted; -100 where nothing is to be learnt
    position_ids  int64 [B, T]    only there when rows are packed; starts again at 0 for each sequence of a row

There is no attention_mask: padding comes last, where a causal model does not look. Without one, transformers makes
attention block-diagonal where position_ids start again, but only without a cache of keys and values, hence
`use_cache=False`.
"""


class StepResult(Protocol):
    """What one step was.

    Attributes:
        loss: mean over all label tokens of all its micro-batches, in nats, before the update.
        grad_norm: global 2-norm of the gradient before clipping.
        step_s: wall time.
        read_bytes, write_bytes: moved from and to disk.
        tokens: of all rows, padding included.
    """

    @property
    def loss(self) -> float: ...
    @property
    def grad_norm(self) -> float: ...
    @property
    def step_s(self) -> float: ...
    @property
    def read_bytes(self) -> int: ...
    @property
    def write_bytes(self) -> int: ...
    @property
    def tokens(self) -> int: ...


class Trainer(Protocol):
    """A model in training, wherever its state lies. One thread at a time may call it.

    Attributes:
        step_number: steps done since the model was fresh; after a resume, that of the commit which was found.
        extra: stored with each commit and found again on resume: plain JSON values, small.
    """

    extra: dict[str, Any]

    @property
    def step_number(self) -> int: ...

    @property
    def peak_nbytes(self) -> int:
        """The process's largest resident set so far."""
        ...

    @property
    def fallbacks(self) -> Sequence[str]:
        """What did not go the fast way, a sentence each."""
        ...

    def step(self, micro_batches: Sequence[MicroBatch], learning_rate: float | None = None) -> StepResult:
        """One update from all of `micro_batches`: every label token weighs the same, whichever micro-batch it is in."""
        ...

    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> tuple[float, int]:
        """Sum of the label tokens' losses in nats and their number, with the present weights. Nothing changes."""
        ...

    def commit(self) -> None:
        """Makes this step the one that a resume finds, with `extra`, whatever happens later."""
        ...

    def whereabouts(self) -> Whereabouts | None:
        """Where weights that no gradient trains are; None where there are none."""
        ...

    def save(self, folder: Path) -> None:
        """Writes the model as it is now, in Hugging Face layout: config and weights, or a PEFT adapter."""
        ...
