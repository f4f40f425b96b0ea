"""Micro-batches and steps out of rows: padding, packing's positions, and where an epoch's last, smaller step ends."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from offload.finetune.encoding import IGNORED
from offload.finetune.protocol import MicroBatch
from offload.finetune.rows import Position, Row, Rows


@dataclass(frozen=True)
class Step:
    """What one step learns from.

    Attributes:
        micro_batches: see MicroBatch.
        tokens: of all sequences, without padding.
        behind: where the next step begins.
    """

    micro_batches: list[MicroBatch]
    tokens: int
    behind: Position


def steps(rows: Rows, position: Position, *, batch: int, accumulation: int, pad: int) -> Iterator[Step]:
    """The rest of an epoch, step by step. Its last step may be smaller.

    Args:
        batch: rows of a micro-batch.
        accumulation: micro-batches of a step.
        pad: token id that fills rows up.
    """
    source = rows.after(position)
    while found := list(islice(source, batch * accumulation)):
        parts = [[row for row, _ in found[at : at + batch]] for at in range(0, len(found), batch)]
        tokens = sum(len(ids) for row, _ in found for ids, _ in row)
        yield Step([collate(part, pad=pad, packed=rows.packing) for part in parts], tokens, found[-1][1])


def steps_of(rows: int, batch: int, accumulation: int) -> int:
    """Steps of an epoch of so many rows."""
    return math.ceil(math.ceil(rows / batch) / accumulation)


def collate(rows: Sequence[Row], *, pad: int, packed: bool) -> MicroBatch:
    """One micro-batch, padded on the right to its longest row.

    A sequence of a packed row never learns to predict the first token of the next one: that label is left out. Padding
    of a packed row counts as a sequence of its own. There is no attention mask: a causal model never sees what comes
    later, and rows of a mask that hide everything are what makes NaN.
    """
    longest = max(sum(len(ids) for ids, _ in row) for row in rows)
    shape = len(rows), longest
    input_ids = torch.full(shape, pad)
    labels = torch.full(shape, IGNORED)
    position_ids = torch.zeros(shape, dtype=torch.int64)
    for r, row in enumerate(rows):
        at = 0
        for ids, wanted in row:
            end = at + len(ids)
            input_ids[r, at:end] = torch.tensor(ids)
            labels[r, at:end] = torch.tensor(wanted)
            labels[r, at] = IGNORED  # the first token of a sequence is predicted from nothing
            position_ids[r, at:end] = torch.arange(len(ids))
            at = end
        position_ids[r, at:] = torch.arange(longest - at)
    return {"input_ids": input_ids, "labels": labels} | ({"position_ids": position_ids} if packed else {})
