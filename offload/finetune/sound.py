"""Whether a model can take a micro-batch, as far as the batch itself shows: what fails within a step ends a run."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from offload.errors import UsageError
from offload.finetune.encoding import IGNORED

LIKE_IDS = ("attention_mask", "token_type_ids", "position_ids")  # of as many rows and tokens, where they are matrices


class Sound:
    """The rules of one model.

    Args:
        root: a transformers model, of which more is known, or any other module.
    """

    def __init__(self, root: nn.Module) -> None:
        model: Any = root
        config: Any = getattr(root, "config", None)
        self._takes = inspect.signature(root.forward)
        self._is_known = config is not None
        self._table: int | None = None
        self._vocabulary: int | None = None
        self._positions: int | None = None
        if not hasattr(config, "get_text_config") or config.get_text_config() is not config:
            return  # ids of images and the like may lie outside of a vocabulary
        try:
            table, head = model.get_input_embeddings(), model.get_output_embeddings()
        except (AttributeError, NotImplementedError):  # a model of something else than tokens
            return
        if isinstance(table, nn.Embedding):
            self._table = table.num_embeddings
        if head is not None:
            self._vocabulary = getattr(config, "vocab_size", None)
        self._has_encoder = bool(getattr(config, "is_encoder_decoder", False))
        most = getattr(config, "max_position_embeddings", None)
        tables = {m.num_embeddings for m in root.modules() if isinstance(m, nn.Embedding) and m is not table}
        if most is not None and tables & {most, most + 2}:  # some begin with two that stand for padding
            self._positions = most

    def check(self, batches: Sequence[object]) -> None:
        """Refuses what would fail in the middle of a step.

        Raises:
            UsageError: says which micro-batch, what is wrong with it, and what to look at.
        """
        for number, batch in enumerate(batches, 1):
            if (what := self._wrong(batch)) is not None:
                where = f"micro-batch {number} of {len(batches)}" if len(batches) > 1 else "the batch"
                raise UsageError(f"{where}: {what}")

    def _wrong(self, batch: Any) -> str | None:
        if not isinstance(batch, Mapping):
            return f"it is a {type(batch).__name__}; give a dictionary with input_ids and labels"
        if self._is_known and batch.get("labels") is None:
            return f"it has {', '.join(batch) or 'nothing'} and no labels, so there is no loss"
        for name, value in batch.items():
            if not isinstance(value, torch.Tensor):
                return f"{name} is a {type(value).__name__}; give a tensor, or leave it out"
        try:
            self._takes.bind(**batch)
        except TypeError as error:
            return f"the model is not called with {', '.join(batch)}: {error}"
        ids, labels = batch.get("input_ids"), batch.get("labels")
        if self._table is None or ids is None:
            return None
        what = self._wrong_ids(ids, batch, self._table)
        if what is None and labels is not None and self._vocabulary is not None:
            return self._wrong_labels(labels, ids, self._vocabulary)
        return what

    def _wrong_ids(self, ids: torch.Tensor, batch: Mapping[str, torch.Tensor], count: int) -> str | None:
        shape = tuple(ids.shape)
        if ids.dim() != 2 or not ids.numel():
            return f"input_ids are of shape {shape}; give rows of at least one token, [rows, tokens]"
        if (what := _outside(ids, count, (torch.int64, torch.int32))) is not None:
            return f"input_ids {what}; was it encoded with another tokenizer?"
        if self._positions is not None and shape[1] > self._positions:
            return f"rows of {shape[1]:,} tokens, but the model has {self._positions:,} positions; cut them"
        for name in LIKE_IDS:
            other = tuple(batch[name].shape) if name in batch else shape
            rows = {1, shape[0]} if name == "position_ids" else {shape[0]}
            if len(other) == 2 and (other[0] not in rows or other[1] != shape[1]):
                return f"{name} are of shape {other}, but input_ids of {shape}"
        return None

    def _wrong_labels(self, labels: torch.Tensor, ids: torch.Tensor, count: int) -> str | None:
        if not self._has_encoder and labels.shape != ids.shape:
            return f"labels are of shape {tuple(labels.shape)}, but input_ids of {tuple(ids.shape)}"
        if (what := _outside(labels[labels != IGNORED], count, (torch.int64,))) is not None:
            return f"labels {what}; {IGNORED} is for what is not to be learnt"
        return None


def _outside(ids: torch.Tensor, count: int, dtypes: Sequence[torch.dtype]) -> str | None:
    """What is wrong with numbers of tokens, of which there are so many."""
    if ids.dtype not in dtypes:
        return f"are {ids.dtype}, and must be {dtypes[0]}"
    if ids.numel():
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= count:
            return f"hold {low if low < 0 else high:,}, but the model has tokens 0 to {count - 1:,}"
    return None
