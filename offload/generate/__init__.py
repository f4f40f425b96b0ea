"""Generating: one batch and what it took, or a file of prompts, batch by batch."""

from offload.generate.answers import Answers, identity_of
from offload.generate.many import Block, arrange, digest_of, ended, even, seed_of
from offload.generate.prompts import Limits, Prompt, read_prompts
from offload.generate.single import Generated, OnToken, check_ids, encode, generate, tokenizer_of
from offload.specs import check_length

__all__ = [
    "Answers",
    "Block",
    "Generated",
    "Limits",
    "OnToken",
    "Prompt",
    "arrange",
    "check_ids",
    "check_length",
    "digest_of",
    "encode",
    "ended",
    "even",
    "generate",
    "identity_of",
    "read_prompts",
    "seed_of",
    "tokenizer_of",
]
