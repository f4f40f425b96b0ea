"""8 bits a weight and a scale for each output."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Int8Weight:
    """A matrix in 8 bits: weight[n, k] = scale[n] * q[n, k].

    Attributes:
        q: int8 [outputs, inputs], -127 to 127.
        scale: float32 [outputs].
    """

    q: torch.Tensor
    scale: torch.Tensor

    @property
    def inputs(self) -> int:
        return self.q.shape[1]

    @property
    def nbytes(self) -> int:
        return self.q.nbytes + self.scale.nbytes


def quantize_int8(weight: torch.Tensor) -> Int8Weight:
    """Symmetric, one scale for each output: the largest magnitude becomes 127."""
    wide = weight.float()
    scale = wide.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return Int8Weight((wide / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale)


def dequantize_int8(
    weight: Int8Weight, dtype: torch.dtype = torch.float32, out: torch.Tensor | None = None
) -> torch.Tensor:
    """[outputs, inputs] of `dtype`, rounded once from float32; in `out` (contiguous, of that dtype) if it is given."""
    wide = weight.q.float() * weight.scale[:, None]
    return wide.to(dtype) if out is None else out.copy_(wide)
