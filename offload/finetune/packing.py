"""Packing: which sequences share a row, and whether a model keeps those of one row apart."""

from __future__ import annotations

import copy
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import torch
import transformers
from transformers import masking_utils

from offload.errors import ModelError

ATTENTION = frozenset({"full_attention", "sliding_attention", "chunked_attention", "attention", "sparse", "dense"})


def pack(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Puts sequences into rows of `size` tokens: best fit, longest first. Returns the members of each row.

    The same as TRL's "bfd". Equal lengths keep their order, so the result follows from the lengths.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # free tokens of a row and its number, sorted
    for k in sorted(range(len(lengths)), key=lambda k: -lengths[k]):
        at = bisect_left(room, (lengths[k], -1))
        if at < len(room):
            free, row = room.pop(at)
            rows[row].append(k)
        else:
            free, row = size, len(rows)
            rows.append([k])
        if free > lengths[k]:
            insort(room, (free - lengths[k], row))
    return rows


def check_packable(config: Any) -> None:
    """Refuses models that would let a packed sequence see the one before it.

    A model keeps them apart if it asks transformers for a mask and says where positions start again. Whether it does
    is found out by calling it, on the meta device and up to that place.

    Raises:
        ModelError: it does not, or it has layers that carry a state from token to token.
    """
    text = config.get_text_config(decoder=True)
    kinds = set(getattr(text, "layer_types", None) or []) | set(getattr(text, "layers_block_type", None) or [])
    advice = "set data.packing=false"
    if others := kinds - ATTENTION:
        names = ", ".join(sorted(others))
        raise ModelError(
            f"packing: {config.model_type} has layers of the kind {names}, which carry what they saw from one sequence "
            f"of a row to the next; {advice}"
        )
    if not _separates(config):
        raise ModelError(
            f"packing: {config.model_type} does not keep the sequences of a row apart, because it masks attention "
            f"without looking at position_ids; {advice}"
        )


class _Separated(Exception):
    """The model has asked where sequences begin."""


def _separates(config: Any) -> bool:
    def found(position_ids: torch.Tensor) -> None:
        raise _Separated

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
        ids = torch.zeros((1, 4), dtype=torch.int64)
        with patch.object(masking_utils, "find_packed_sequence_indices", found):
            try:
                model(input_ids=ids, position_ids=torch.zeros_like(ids), use_cache=False)
            except _Separated:
                return True
            except Exception:  # it went past the place, and fails where numbers are needed
                return False
    return False
