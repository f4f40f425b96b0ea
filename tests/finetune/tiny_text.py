"""A small tokenizer that is trained on the spot, and a tiny model that goes with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

CORPUS = ["The river bends where the old mill stands, and the mill turns. Who turns the mill? The river does."] * 4
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def tokenizer(end: str = "</s>", **more: Any) -> Any:
    """Byte-level BPE of 320 tokens."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token=end, pad_token=end, **more
    )


def save(folder: Path, kind: str = "llama", dtype: torch.dtype = torch.float32, **more: Any) -> Path:
    """A checkpoint with tokenizer."""
    from models import MODELS

    MODELS[kind].save(folder, dtype)
    tokenizer(**more).save_pretrained(folder)
    return folder
