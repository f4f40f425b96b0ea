"""What is correct: each op in plain torch, as short as it can be said. Kernels are held to these within tolerances."""

from offload.kernels.formats.lossless import unpack_lossless
from offload.kernels.reference.adamw import AdamW, adamw_step
from offload.kernels.reference.attention import decode_attention, merge_attention
from offload.kernels.reference.gather import gather_pages
from offload.kernels.reference.linear import linear, linear_int4, linear_int8, linear_lossless

__all__ = [
    "AdamW",
    "adamw_step",
    "decode_attention",
    "gather_pages",
    "linear",
    "linear_int4",
    "linear_int8",
    "linear_lossless",
    "merge_attention",
    "unpack_lossless",
]
