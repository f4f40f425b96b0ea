"""bfloat16 in 12 bits a weight, every bit kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

LOSSLESS_BLOCK = 64  # weights whose exponent codes share 32 bytes


@dataclass(frozen=True, eq=False)
class LosslessWeight:
    """A bfloat16 matrix in 12 bits a weight and a few patches; every bit comes back.

    Weights use few of the 256 exponents (DFloat11, Zhang et al., 2025; ZipNN, Hershcovitch et al., 2024, store them in
    Huffman codes). Here an exponent is four bits, its distance from the largest; 15 means that a patch has it.

    Attributes:
        low: uint8 [outputs, padded]: the sign, then the seven bits of the mantissa. Inputs are padded to whole blocks.
        codes: uint8 [outputs, padded / 2]: byte j of a block has input j in its low half and input 32 + j in the high.
        largest: the largest exponent of the matrix.
        patch_start: int32 [outputs + 1]: where the patches of an output begin, and where the last one's end. Slices of
            a matrix by outputs share the lists of patches.
        patch_input: int32 [patches, or more]: the input of each.
        patch_exponent: uint8 [patches, or more]: its exponent.
        inputs: without the padding.
    """

    low: torch.Tensor
    codes: torch.Tensor
    largest: int
    patch_start: torch.Tensor
    patch_input: torch.Tensor
    patch_exponent: torch.Tensor
    inputs: int

    @property
    def nbytes(self) -> int:
        parts = self.low, self.codes, self.patch_start, self.patch_input, self.patch_exponent
        return sum(part.nbytes for part in parts)


def pack_lossless(
    weight: torch.Tensor, largest: int | None = None, planes: tuple[torch.Tensor, torch.Tensor] | None = None
) -> LosslessWeight:
    """bfloat16 [outputs, inputs] in fewer bits.

    Args:
        largest: the largest exponent of the matrix, where `weight` is only some of its rows; default: that of `weight`.
        planes: where `low` and `codes` of the result shall lie, contiguous; default: new memory.
    """
    outputs, inputs = weight.shape
    bits = functional.pad(weight.view(torch.int16), (0, -inputs % LOSSLESS_BLOCK)).to(torch.int32) & 0xFFFF
    exponent = bits >> 7 & 0xFF
    largest = int(exponent.max()) if largest is None else largest
    exponent[:, inputs:] = largest
    code = (largest - exponent).clamp_max_(15).to(torch.uint8)
    halves = code.view(outputs, -1, 2, LOSSLESS_BLOCK // 2)
    output, at = (code == 15).nonzero(as_tuple=True)
    start = torch.zeros(outputs + 1, dtype=torch.int32)
    start[1:] = torch.bincount(output, minlength=outputs).cumsum(0)
    low = (bits >> 8 & 0x80 | bits & 0x7F).to(torch.uint8)
    codes = (halves[:, :, 0] | halves[:, :, 1] << 4).view(outputs, -1)
    if planes is not None:
        low, codes = planes[0].copy_(low), planes[1].copy_(codes)
    return LosslessWeight(
        low=low,
        codes=codes,
        largest=largest,
        patch_start=start,
        patch_input=at.to(torch.int32),
        patch_exponent=exponent[output, at].to(torch.uint8),
        inputs=inputs,
    )


def unpack_lossless(weight: LosslessWeight) -> torch.Tensor:
    """The bfloat16 matrix [outputs, inputs], bit for bit."""
    outputs, padded = weight.low.shape
    blocks = weight.codes.view(outputs, -1, LOSSLESS_BLOCK // 2)
    code = torch.stack([blocks & 15, blocks >> 4], dim=2).view(outputs, padded).to(torch.int32)
    exponent = weight.largest - code
    patches = slice(int(weight.patch_start[0]), int(weight.patch_start[-1]))
    rows = torch.arange(outputs, device=exponent.device)
    output = torch.repeat_interleave(rows, weight.patch_start.diff().long())
    exponent[output, weight.patch_input[patches].long()] = weight.patch_exponent[patches].to(torch.int32)
    low = weight.low.to(torch.int32)
    bits = (low & 0x80) << 8 | exponent << 7 | low & 0x7F
    return bits.to(torch.int16)[:, : weight.inputs].contiguous().view(torch.bfloat16)
