"""Formats of weights as a user names them: none, lossless, int8, int4 and what int4 takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from offload.kernels.formats.form import Form
from offload.kernels.formats.names import read_name

_ROOM = 64  # a lossless matrix made while loading has room for one patch in so many weights


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """What weights are kept as.

    Attributes:
        kind: lossless, int8 or int4.
        group, symmetric: of int4.
    """

    kind: str
    group: int = 0
    symmetric: bool = False

    def __str__(self) -> str:
        return self.kind + f"-{self.group}" * (self.kind == "int4") + "-symmetric" * self.symmetric

    @property
    def is_approximate(self) -> bool:
        return self.kind != "lossless"

    def takes(self, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this kind can be kept so."""
        is_kind = dtype == torch.bfloat16 if self.kind == "lossless" else dtype.is_floating_point
        return is_kind and len(shape) == 2 and 0 not in shape

    def form(self, shape: tuple[int, ...]) -> Form:
        """The form of a matrix that has not been seen yet."""
        outputs, inputs = shape
        patches = -(-outputs * inputs // _ROOM) if self.kind == "lossless" else 0
        return Form(
            kind=self.kind, outputs=outputs, inputs=inputs, group=self.group, symmetric=self.symmetric, patches=patches
        )


def parse_weights(text: str | None) -> WeightFormat | None:
    """What `--weights` means; None for weights as they are stored.

    Args:
        text: none, lossless, int8, or int4, which may be followed by -32, -64 or -128 (weights that share a scale; 32
            where nothing is said) and by -symmetric (a scale without an offset).

    Raises:
        UsageError: anything else.
    """
    found = read_name(text)
    return None if found is None else WeightFormat(*found)
