"""A model as others load it: weights from the trainer; tokenizer, chat template and generation settings beside them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from offload.finetune.aside import aside
from offload.finetune.protocol import Trainer
from offload.finetune.written import written

CHECKPOINT = "checkpoint-"


def save(trainer: Trainer, folder: Path, *, tokenizer: Any, source: Path) -> None:
    """Writes everything that plain transformers (or PEFT, for adapters) needs to load the model from `folder`, where an
    older model stays until all is written.

    Args:
        tokenizer: with the chat template that was trained on.
        source: folder of the model that training began with.

    Raises:
        StorageError: something cannot be written.
    """
    with aside(folder) as part:
        trainer.save(part)
        tokenizer.save_pretrained(part)
        _generation(part, tokenizer, source)


def export(trainer: Trainer, output_dir: Path, step: int, *, keep: int | None, **what: Any) -> Path:
    """Writes output_dir/checkpoint-STEP, whole or not at all, and removes the oldest if there are more than `keep`."""
    target = output_dir / f"{CHECKPOINT}{step}"
    part = output_dir / f".{target.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    save(trainer, part, **what)
    with written(target):
        if target.exists():  # of a run that was cut off behind it
            shutil.rmtree(target)
        os.rename(part, target)
        found = sorted(output_dir.glob(CHECKPOINT + "*"), key=_number)
        for old in found[: max(0, len(found) - keep)] if keep else []:
            shutil.rmtree(old)
    return target


def _number(path: Path) -> int:
    return int(path.name.removeprefix(CHECKPOINT))


def _generation(folder: Path, tokenizer: Any, source: Path) -> None:
    """The model's generation settings, which also stop at the token that ends an answer in the trained template."""
    settings = GenerationConfig()
    if (source / "generation_config.json").is_file():
        settings = GenerationConfig.from_pretrained(source)
    ends = settings.eos_token_id
    known = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in known:
        known.append(tokenizer.eos_token_id)
    settings.eos_token_id = known[0] if len(known) == 1 else known or None
    if settings.pad_token_id is None:
        settings.pad_token_id = tokenizer.pad_token_id
    settings.save_pretrained(folder)
