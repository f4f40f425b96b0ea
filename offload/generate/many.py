"""Many prompts in batches that share each pass over the weights: which go together, and what each batch begins from.

This is FlexGen's block schedule (Sheng et al. 2023, arXiv 2303.06865) with one batch to a block: every weight that is
read serves the whole batch before the next one is read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from offload.generate.prompts import AS_ASKED, Prompt


@dataclass(frozen=True, kw_only=True)
class Block:
    """Prompts that run together.

    Attributes:
        number: its place in the order of work, from 0.
        prompts: of similar length, longest first.
    """

    number: int
    prompts: tuple[Prompt, ...]


def arrange(prompts: Sequence[Prompt], batch: int) -> list[Block]:
    """Batches of prompts of similar length, so that little is padded; the longest first, so that memory fails early.

    It depends on the prompts and the batch alone: a run that goes on makes the same blocks, and thus the same tokens.
    """
    ordered = sorted(prompts, key=lambda p: (-len(p.ids), p.index))
    return [
        Block(number=number, prompts=tuple(ordered[start : start + batch]))
        for number, start in enumerate(range(0, len(ordered), batch))
    ]


def even(count: int, batch: int) -> int:
    """The smallest batch that needs no more blocks: what it leaves free keeps more weights in memory."""
    blocks = -(-count // batch)
    return -(-count // blocks)


def seed_of(seed: int, block: int) -> int:
    """Seed of one block's sampling: the same whether or not other blocks ran before it in this process."""
    digest = hashlib.blake2b(f"{seed}:{block}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little")


def ended(tokens: Sequence[int], ends: Collection[int]) -> tuple[list[int], bool]:
    """The tokens before the first end token, and whether there was one; what follows it is padding."""
    for place, token in enumerate(tokens):
        if token in ends:
            return list(tokens[:place]), True
    return list(tokens), False


def digest_of(prompts: Sequence[Prompt]) -> str:
    """Of all prompts' tokens and settings, in their order."""
    hasher = hashlib.blake2b(digest_size=16)
    for prompt in prompts:
        own = "" if prompt.settings == AS_ASKED else f":{prompt.settings}"
        hasher.update(f"{prompt.line}:{','.join(map(str, prompt.ids))}{own}\n".encode())
    return hasher.hexdigest()
