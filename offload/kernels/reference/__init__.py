"""What is correct: each op in plain torch, as short as it can be said. Kernels are held to these within tolerances."""

from offload.kernels.formats.int4 import dequantize_int4, quantize_int4
from offload.kernels.formats.int8 import dequantize_int8, quantize_int8
from offload.kernels.formats.lossless import pack_lossless, unpack_lossless
from offload.kernels.reference.adamw import AdamW, adamw_step, adamw_step_8bit
from offload.kernels.reference.attention import decode_attention, merge_attention
from offload.kernels.reference.block import rms_norm, rotary, silu_mul
from offload.kernels.reference.checksum import checksum
from offload.kernels.reference.directions import Along, Sides, direction, move_along
from offload.kernels.reference.gate_up_silu import gate_up_silu
from offload.kernels.reference.gather import gather_pages
from offload.kernels.reference.linear import (
    linear,
    linear_groups,
    linear_int4,
    linear_int8,
    linear_lossless,
    linear_many,
    linear_transposed,
    linears,
)
from offload.kernels.reference.square_sum import square_sum

__all__ = [
    "AdamW",
    "Along",
    "Sides",
    "adamw_step",
    "adamw_step_8bit",
    "checksum",
    "decode_attention",
    "dequantize_int4",
    "dequantize_int8",
    "direction",
    "gate_up_silu",
    "gather_pages",
    "linear",
    "linear_groups",
    "linear_int4",
    "linear_int8",
    "linear_lossless",
    "linear_many",
    "linear_transposed",
    "linears",
    "merge_attention",
    "move_along",
    "pack_lossless",
    "quantize_int4",
    "quantize_int8",
    "rms_norm",
    "rotary",
    "silu_mul",
    "square_sum",
    "unpack_lossless",
]
