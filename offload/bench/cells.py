"""The grid of `offload bench plan`: models, memory, batches, contexts and links, and which of them are held out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

HELD_OUT_MODEL = "phi3"  # all of it; of the others every sixth cell
EVERY = 6
MODELS: Mapping[str, Mapping[str, Any]] = {  # transformers' configuration by class, about 0.6 GB each in bf16
    "llama": {
        "config": "LlamaConfig", "hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 12,
        "num_attention_heads": 12, "num_key_value_heads": 4, "vocab_size": 16000, "max_position_embeddings": 2048,
    },
    "qwen3": {
        "config": "Qwen3Config", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 20,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 16000,
        "max_position_embeddings": 2048, "tie_word_embeddings": True,
    },
    "moe": {
        "config": "Qwen3MoeConfig", "hidden_size": 1024, "moe_intermediate_size": 512, "intermediate_size": 2048,
        "num_hidden_layers": 10, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64,
        "num_experts": 16, "num_experts_per_tok": 4, "vocab_size": 16000, "max_position_embeddings": 2048,
    },
    "phi3": {
        "config": "Phi3Config", "hidden_size": 1280, "intermediate_size": 3584, "num_hidden_layers": 15,
        "num_attention_heads": 20, "num_key_value_heads": 20, "vocab_size": 16000, "max_position_embeddings": 2048,
    },
}  # fmt: skip
TINY: Mapping[str, Mapping[str, Any]] = {  # for tests
    "llama": {
        "config": "LlamaConfig", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 2048,
    },
}  # fmt: skip
KEEPS = (0.2, 0.35, 0.6, 1.4)  # of the weights that memory holds, with their ring; the last: all of them
DEVICE_KEEPS = (0.25, 0.5)
MOE_KEEP = 0.4  # in place of less: experts are one tensor a layer, of which the ring needs two
LINKS = (2.0, 4.0, 8.0, 16.0)
WORK = ((1, 16), (1, 128), (1, 512), (2, 64), (4, 128), (8, 32), (16, 64), (32, 16))  # batch, tokens of a prompt


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One configuration.

    Attributes:
        model: a name of the table of models.
        keep: of its weights, what memory holds: the device's where there is a link, else main memory.
        batch, context: sequences, and tokens of each prompt.
        link: GB/s of an emulated device's link; None: the model computes in main memory.
        is_held_out: no run of it teaches anything that it is judged by.
    """

    model: str
    keep: float
    batch: int
    context: int
    link: float | None
    is_held_out: bool

    @property
    def name(self) -> str:
        link = f" link {self.link:g}" if self.link is not None else ""
        return f"{self.model} keep {self.keep:g} batch {self.batch} context {self.context}{link}"

    @property
    def new_tokens(self) -> int:
        """Steps that are measured, and the first token."""
        return 9 if self.keep < 1 else 17


def grid(models: Sequence[str] = tuple(MODELS)) -> tuple[Cell, ...]:
    """All cells: of each model ten in main memory and six behind a link, every workload at least once."""
    cells: list[Cell] = []
    for k, model in enumerate(models):
        here: list[tuple[float, int, int, float | None]] = []
        for j in range(10):
            batch, context = WORK[(3 * j + k) % len(WORK)]
            here.append((KEEPS[(j + j // len(WORK)) % len(KEEPS)], batch, context, None))
        for j, (link, keep) in enumerate(list(product(LINKS, DEVICE_KEEPS))[k % 2 : k % 2 + 6]):
            batch, context = WORK[(5 * j + k) % len(WORK)]
            here.append((keep, batch, context, link))
        for j, (keep, batch, context, link) in enumerate(here):
            held = model == HELD_OUT_MODEL or (j + k) % EVERY == 2
            if model == "moe" and keep < KEEPS[1]:
                keep = MOE_KEEP
            cells.append(Cell(model=model, keep=keep, batch=batch, context=context, link=link, is_held_out=held))
    return tuple(cells)


def some(cells: Sequence[Cell], count: int) -> tuple[Cell, ...]:
    """So many of them, spread over the grid, held-out ones among them in the same proportion."""
    if count >= len(cells):
        return tuple(cells)
    chosen: list[Cell] = []
    for held in (False, True):
        kind = [c for c in cells if c.is_held_out is held]
        part = round(count * len(kind) / len(cells))
        chosen += [kind[k * len(kind) // part] for k in range(part)]
    return tuple(chosen)
