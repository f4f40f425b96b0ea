"""4 bits a weight, and a scale and an offset for each group of inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

INT4_CHUNK = 128  # weights that share 64 bytes: 16 little-endian words of 8


@dataclass(frozen=True, eq=False)
class Int4Weight:
    """A matrix in 4 bits: weight[n, k] = scale * q + offset, with a scale and an offset for each group of inputs.

    Attributes:
        packed: uint8 [outputs, padded / 2]: chunks of 128 inputs as 16 words of 32 bits; the lower half of word l holds
            inputs l, 32 + l, 64 + l, 96 + l of its chunk, lowest bits first, the upper half those 16 further on, so
            that what is side by side in both halves needs one scale. Inputs are padded to whole chunks.
        scale: float16 [outputs, padded / group].
        offset: float16 of the same shape; None for symmetric: -8 * scale.
        inputs: without the padding.
        group: inputs that share a scale: 32, 64 or 128.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor | None
    inputs: int
    group: int

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scale.nbytes + (self.offset.nbytes if self.offset is not None else 0)


def quantize_int4(weight: torch.Tensor, group: int = 32, symmetric: bool = False) -> Int4Weight:
    """Rounds to the nearest of 16 values: of the group's range, or (symmetric) of -8 to 7 times its scale."""
    outputs, inputs = weight.shape
    padded = -(-inputs // INT4_CHUNK) * INT4_CHUNK
    wide = functional.pad(weight.float(), (0, padded - inputs)).view(outputs, padded // group, group)
    if symmetric:
        extreme = wide.gather(2, wide.abs().argmax(2, keepdim=True)).squeeze(2)
        scale, offset = (extreme / -8).half(), None  # the largest magnitude, whatever its sign, becomes -8
        low = -8 * scale.float()
    else:
        low, high = wide.amin(2), wide.amax(2)
        scale, offset = ((high - low) / 15).half(), low.half().add_(0)  # zero has one sign, in whatever order
        low = offset.float()
    step = scale.float()
    safe = torch.where(step == 0, torch.ones_like(step), step)
    q = ((wide - low[..., None]) / safe[..., None]).round_().clamp_(0, 15).to(torch.uint8)
    return Int4Weight(_pack_int4(q.view(outputs, padded)), scale, offset, inputs, group)


def first_bit(part: int) -> int:
    """Where in every word of a chunk the weights 16 * part and on begin."""
    return 4 * (part >> 1) + 16 * (part & 1)


def _pack_int4(q: torch.Tensor) -> torch.Tensor:
    parts = q.view(q.shape[0], -1, 2, 2, 2, 16)  # chunk, byte of a half, bits of a byte, half of a word, word
    return (parts[:, :, :, 0] | parts[:, :, :, 1] << 4).permute(0, 1, 4, 3, 2).reshape(q.shape[0], -1).contiguous()


def dequantize_int4(
    weight: Int4Weight, dtype: torch.dtype = torch.float32, out: torch.Tensor | None = None
) -> torch.Tensor:
    """[outputs, inputs] of `dtype`, rounded once from float32; in `out` (contiguous, of that dtype) if it is given."""
    outputs = weight.packed.shape[0]
    words = weight.packed.view(outputs, -1, 16, 2, 2).permute(0, 1, 4, 3, 2)
    q = torch.stack([words & 15, words >> 4], dim=3).reshape(outputs, -1, weight.group).float()
    scale = weight.scale.float()
    offset = -8 * scale if weight.offset is None else weight.offset.float()
    wide = (q * scale[..., None] + offset[..., None]).view(outputs, -1)[:, : weight.inputs]
    return wide.to(dtype) if out is None else out.copy_(wide)
