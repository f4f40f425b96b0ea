"""A cache with room to grow holds what transformers' own holds, whatever is done with it."""

import random
from collections.abc import Callable

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, MistralConfig

from offload.runtime.cache import RoomyLayer, RoomySlidingLayer, make_roomy

CONFIGS = {
    "full": LlamaConfig(num_hidden_layers=2),
    "sliding": MistralConfig(num_hidden_layers=2, sliding_window=5),
}


def pair(kind: str, planned: int) -> tuple[DynamicCache, DynamicCache]:
    """(transformers' own, a roomy one)"""
    own, roomy = (DynamicCache(config=CONFIGS[kind]) for _ in range(2))
    make_roomy(roomy, planned)
    wanted = RoomyLayer if kind == "full" else RoomySlidingLayer
    assert all(type(layer) is wanted for layer in roomy.layers)
    return own, roomy


def append(caches: tuple[DynamicCache, DynamicCache], batch: int, tokens: int) -> None:
    """The same new tokens to both, and the same answers from both."""
    for layer in range(2):
        new = torch.randn(2, batch, 3, tokens, 16)
        assert caches[0].get_mask_sizes(tokens, layer) == caches[1].get_mask_sizes(tokens, layer)
        for a, b in zip(*(cache.update(new[0], new[1], layer) for cache in caches), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("kind", list(CONFIGS))
@pytest.mark.parametrize("planned", [0, 12, 600])
def test_appending(kind: str, planned: int) -> None:
    torch.manual_seed(0)
    caches = pair(kind, planned)
    for tokens in (7, 1, 1, 3, 1, 300, 1, 1, 2, *[1] * 280):
        append(caches, 2, tokens)
    assert caches[0].get_seq_length() == caches[1].get_seq_length()


def test_memory_is_written_in_place_where_it_was_planned() -> None:
    caches = pair("full", 40)
    append(caches, 1, 8)
    where = caches[1].layers[0].keys.data_ptr()
    for _ in range(32):
        append(caches, 1, 1)
    assert caches[1].layers[0].keys.data_ptr() == where


Act = Callable[[DynamicCache, int], object]
ACTS: dict[str, Act] = {
    "reorder": lambda cache, batch: cache.reorder_cache(torch.arange(batch).flip(0)),
    "repeat": lambda cache, batch: cache.batch_repeat_interleave(2),
    "select": lambda cache, batch: cache.batch_select_indices(torch.arange(max(1, batch // 2))),
    "crop": lambda cache, batch: cache.crop(-1),
}


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_everything_else_in_any_order(kind: str) -> None:
    torch.manual_seed(0)
    choices = random.Random(0)
    caches, batch = pair(kind, 64), 2
    append(caches, batch, 3)
    for _ in range(60):
        act = choices.choice([*ACTS] if kind == "full" else ["reorder", "repeat", "select"])
        if (act == "repeat" and batch > 8) or (act == "crop" and caches[0].get_seq_length() < 3):
            continue
        for cache in caches:
            ACTS[act](cache, batch)
        batch = {"repeat": 2 * batch, "select": max(1, batch // 2)}.get(act, batch)
        append(caches, batch, choices.choice([1, 1, 2]))
    for cache in caches:
        cache.reset()
    emptied = caches[0].get_seq_length() == 0  # 5.17 fills full layers with zeros, batch and all
    append(caches, 1 if emptied else batch, 4)


def test_a_cache_in_use_is_taken_over() -> None:
    caches = tuple(DynamicCache(config=CONFIGS["full"]) for _ in range(2))
    append(caches, 2, 5)  # type: ignore[arg-type]
    make_roomy(caches[1], 9)
    for tokens in (1, 1, 9):
        append(caches, 2, tokens)  # type: ignore[arg-type]


def test_what_is_no_cache_is_left_alone() -> None:
    make_roomy(None, 3)
    make_roomy((), 3)
