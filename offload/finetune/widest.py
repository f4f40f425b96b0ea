"""The tokens that memory was divided for, and whether a step has more: what activations take grows with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

GROWTH = 1.25  # room for rows that are longer yet, once some were: memory is divided again a few times in a run


@dataclass(frozen=True, slots=True)
class Tokens:
    """Of one step, padding included.

    Attributes:
        widest: of its largest micro-batch.
        total: of all its micro-batches.
    """

    widest: int = 0
    total: int = 0

    def hold(self, other: Tokens) -> bool:
        """Whether a step of `other` has no more."""
        return other.widest <= self.widest and other.total <= self.total

    def grown(self) -> Tokens:
        """With room for more."""
        return Tokens(int(GROWTH * self.widest), int(GROWTH * self.total))


def tokens_of(batches: Sequence[Mapping[str, torch.Tensor]]) -> Tokens:
    """Of these micro-batches; those of a model that is called with something else count nothing."""
    each = [b["input_ids"].numel() for b in batches if "input_ids" in b]
    return Tokens(max(each, default=0), sum(each))
