"""From a checked configuration and a tokenizer to data that is ready: indexed, with a chat template, in rows."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

from offload.errors import UsageError
from offload.finetune.config import Config
from offload.finetune.encoding import IGNORED, Encoder
from offload.finetune.feed import Feed
from offload.finetune.files import DataFiles, Records
from offload.finetune.packing import check_packable
from offload.finetune.rows import Position, Rows
from offload.finetune.templates import use_template


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Data that is ready.

    Attributes:
        feed, eval_feed: training data and held-out data.
        template: the chat template in words.
        identity: what a resumed run must share, by key of the configuration.
    """

    feed: Feed
    eval_feed: Feed | None
    template: str
    identity: dict[str, Any]

    @property
    def records(self) -> Records:
        """Training records."""
        return self.feed.rows.records


def prepare(config: Config, tokenizer: Any, model_config: Any, found: DataFiles) -> Prepared:
    """Sets the chat template and puts records in rows.

    Args:
        tokenizer: the model's; its chat template may be changed.
        model_config: transformers' configuration of the model.
        found: the files of data.

    Raises:
        UsageError, DataError: the data cannot be used.
        ModelError: the model cannot keep packed sequences apart.
    """
    data, train = config.data, config.train
    _check_length(config, model_config)
    if data.packing:
        check_packable(model_config)
    records, held_out = found.records, found.held_out
    talks = any(file.has_conversations for part in (records, held_out) if part for file in part.files)
    template = use_template(tokenizer, data.chat_template, is_needed=talks)
    encoder = Encoder(
        tokenizer,
        max_length=data.max_length,
        truncation_mode=data.truncation_mode,
        assistant_only_loss=data.assistant_only_loss,
        completion_only_loss=data.completion_only_loss,
    )
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)

    def feed(source: Records, batch: int, *, shuffle: bool) -> Feed:
        rows = Rows(
            source,
            encoder,
            max_length=data.max_length,
            packing=data.packing,
            shuffle=shuffle,
            seed=train.seed,
            skip_bad=data.on_bad_line == "skip",
        )
        return Feed(rows, batch, train.gradient_accumulation_steps, pad)

    learnt = feed(records, train.per_device_train_batch_size, shuffle=data.shuffle)
    evaluated = train.per_device_eval_batch_size or train.per_device_train_batch_size
    return Prepared(
        feed=learnt,
        eval_feed=feed(held_out, evaluated, shuffle=False) if held_out else None,
        template=template,
        identity=_identity(config, records, tokenizer),
    )


def excerpt(feed: Feed, tokenizer: Any) -> str:
    """The text of the first row, with what is learnt between ⟦ and ⟧."""
    row, _ = next(feed.rows.after(Position()))
    text, inside = "", False
    for ids, labels in row:
        start = 0
        for k in range(1, len(ids) + 1):
            if k == len(ids) or (labels[k] == IGNORED) != (labels[start] == IGNORED):
                part = tokenizer.decode(ids[start:k])
                inside = labels[start] != IGNORED
                text += f"⟦{part}⟧" if inside else part
                start = k
    return text


def _check_length(config: Config, model_config: Any) -> None:
    text = model_config.get_text_config(decoder=True)
    limit = getattr(text, "max_position_embeddings", None) or math.inf
    if config.data.max_length > limit:
        raise UsageError(
            f"data.max_length={config.data.max_length:,}, but the model's context is {limit:,} tokens; lower it"
        )


def _identity(config: Config, records: Records, tokenizer: Any) -> dict[str, Any]:
    """The data, and every setting that decides which tokens come when."""
    data, train = config.data, config.train
    template = str(getattr(tokenizer, "chat_template", None))
    sections = {
        "data": ("max_length", "packing", "truncation_mode", "assistant_only_loss", "completion_only_loss", "shuffle"),
        "train": ("seed", "per_device_train_batch_size", "gradient_accumulation_steps"),
    }
    values = {f"{name}.{key}": getattr({"data": data, "train": train}[name], key)
              for name, keys in sections.items() for key in keys}  # fmt: skip
    return values | {
        "method": config.method,
        "digest of data.train": records.digest,
        "digest of the chat template": hashlib.blake2b(template.encode(), digest_size=8).hexdigest(),
    }
