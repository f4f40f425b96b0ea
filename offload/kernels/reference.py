"""What is correct: each op in plain torch, as short as it can be said. Kernels are held to these within tolerances."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

INT4_CHUNK = 128  # weights that share 64 bytes: 16 little-endian words of 8


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., inputs] by weight [outputs, inputs], plus bias [outputs]."""
    return functional.linear(x, weight, bias)


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
    def nbytes(self) -> int:
        return self.q.nbytes + self.scale.nbytes


def quantize_int8(weight: torch.Tensor) -> Int8Weight:
    """Symmetric, one scale for each output: the largest magnitude becomes 127."""
    wide = weight.float()
    scale = wide.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return Int8Weight((wide / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale)


def dequantize_int8(weight: Int8Weight) -> torch.Tensor:
    """float32 [outputs, inputs]."""
    return weight.q.float() * weight.scale[:, None]


def linear_int8(x: torch.Tensor, weight: Int8Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """As `linear`, in float32 throughout; the result has x's dtype."""
    wide = functional.linear(x.float(), dequantize_int8(weight), None if bias is None else bias.float())
    return wide.to(x.dtype)


@dataclass(frozen=True, eq=False)
class Int4Weight:
    """A matrix in 4 bits: weight[n, k] = scale * q + offset, with a scale and an offset for each group of inputs.

    Attributes:
        packed: uint8 [outputs, padded / 2]: chunks of 128 inputs as 16 words of 32 bits; word l holds inputs l, 16 + l,
            ... 112 + l of its chunk, lowest bits first. Inputs are padded to whole chunks.
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


def quantize_int4(weight: torch.Tensor, group: int = 32, *, symmetric: bool = False) -> Int4Weight:
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
        scale, offset = ((high - low) / 15).half(), low.half()
        low = offset.float()
    step = scale.float()
    safe = torch.where(step == 0, torch.ones_like(step), step)
    q = ((wide - low[..., None]) / safe[..., None]).round_().clamp_(0, 15).to(torch.uint8)
    return Int4Weight(_pack_int4(q.view(outputs, padded)), scale, offset, inputs, group)


def _pack_int4(q: torch.Tensor) -> torch.Tensor:
    parts = q.view(q.shape[0], -1, 4, 2, 16)  # chunk, byte of the word, low or high half, word
    return (parts[:, :, :, 0] | parts[:, :, :, 1] << 4).transpose(2, 3).reshape(q.shape[0], -1).contiguous()


def dequantize_int4(weight: Int4Weight) -> torch.Tensor:
    """float32 [outputs, inputs]."""
    outputs = weight.packed.shape[0]
    words = weight.packed.view(outputs, -1, 16, 4).transpose(2, 3)
    q = torch.stack([words & 15, words >> 4], dim=3).reshape(outputs, -1, weight.group).float()
    scale = weight.scale.float()
    offset = -8 * scale if weight.offset is None else weight.offset.float()
    return (q * scale[..., None] + offset[..., None]).view(outputs, -1)[:, : weight.inputs]


def linear_int4(x: torch.Tensor, weight: Int4Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """As `linear`, in float32 throughout; the result has x's dtype."""
    wide = functional.linear(x.float(), dequantize_int4(weight), None if bias is None else bias.float())
    return wide.to(x.dtype)


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """The numbers of one AdamW step (Loshchilov and Hutter, 2019), in torch's names.

    Attributes:
        step: which step this is, from 1.
        grad_scale: every gradient is multiplied by it first: a clip factor, or one over a loss scale.
    """

    lr: float
    step: int
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    grad_scale: float = 1.0


def adamw_step(
    master: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    grad: torch.Tensor,
    weight: torch.Tensor | None,
    numbers: AdamW,
) -> float:
    """One step in place, as torch.optim.AdamW does it.

    Args:
        master, exp_avg, exp_avg_sq: float32 [n], changed.
        grad: bfloat16 or float32 [n].
        weight: bfloat16 [n] that gets the new master, rounded; or None.

    Returns:
        The sum of the squares of the gradient as it came (not scaled): finite only if every element is.
    """
    squares = float(grad.double().square().sum())
    g = grad.float() * numbers.grad_scale
    beta1, beta2 = numbers.betas
    master.mul_(1 - numbers.lr * numbers.weight_decay)
    exp_avg.lerp_(g, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    denominator = (exp_avg_sq.sqrt() / (1 - beta2**numbers.step) ** 0.5).add_(numbers.eps)
    master.addcdiv_(exp_avg, denominator, value=-numbers.lr / (1 - beta1**numbers.step))
    if weight is not None:
        weight.copy_(master)
    return squares


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
        patch_start: int32 [outputs + 1]: where the patches of an output begin.
        patch_input: int32 [patches]: the input of each.
        patch_exponent: uint8 [patches]: its exponent.
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


def pack_lossless(weight: torch.Tensor) -> LosslessWeight:
    """bfloat16 [outputs, inputs] in fewer bits."""
    outputs, inputs = weight.shape
    bits = functional.pad(weight.view(torch.int16), (0, -inputs % LOSSLESS_BLOCK)).to(torch.int32) & 0xFFFF
    exponent = bits >> 7 & 0xFF
    exponent[:, inputs:] = largest = int(exponent.max())
    code = (largest - exponent).clamp_max_(15).to(torch.uint8)
    halves = code.view(outputs, -1, 2, LOSSLESS_BLOCK // 2)
    output, at = (code == 15).nonzero(as_tuple=True)
    start = torch.zeros(outputs + 1, dtype=torch.int32)
    start[1:] = torch.bincount(output, minlength=outputs).cumsum(0)
    return LosslessWeight(
        low=(bits >> 8 & 0x80 | bits & 0x7F).to(torch.uint8),
        codes=(halves[:, :, 0] | halves[:, :, 1] << 4).view(outputs, -1),
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
    output = torch.repeat_interleave(torch.arange(outputs), weight.patch_start.diff())
    exponent[output, weight.patch_input.long()] = weight.patch_exponent.to(torch.int32)
    low = weight.low.to(torch.int32)
    bits = (low & 0x80) << 8 | exponent << 7 | low & 0x7F
    return bits.to(torch.int16)[:, : weight.inputs].contiguous().view(torch.bfloat16)


def linear_lossless(x: torch.Tensor, weight: LosslessWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """As `linear` with the matrix unpacked."""
    return linear(x, unpack_lossless(weight), bias)
