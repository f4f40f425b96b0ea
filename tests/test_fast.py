"""`exact=False`: near transformers, and still the same bits wherever the weights are, by however many threads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import MODELS

import offload

pytestmark = pytest.mark.usefixtures("two_threads")
PROMPT = torch.tensor([[44, 45, 46, 47, 48, 49, 300, 51], [5, 9, 200, 31, 7, 44, 3, 8]])
PLACES: list[dict[str, Any]] = [
    {"resident": 0},
    {"resident": 0.5, "slots": 1},
    {"device": "emulated", "gpu_memory": "1GiB", "resident": 0.5},
    {},
]


@pytest.fixture(scope="module", params=["llama", "qwen2", "gpt2", "mixtral"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MODELS[request.param].save(tmp_path_factory.mktemp(request.param), torch.bfloat16)


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def outputs(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of steps of two rows, and greedy tokens."""
    found = model.generate(
        PROMPT, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True, pad_token_id=0
    )
    return torch.stack(found.logits), found.sequences


def fast(checkpoint: Path, **place: Any) -> tuple[torch.Tensor, torch.Tensor]:
    with offload.load(checkpoint, exact=False, strict=True, context=32, batch=2, **place) as model:
        return outputs(model)


def test_the_same_bits_in_every_place(checkpoint: Path) -> None:
    logits, tokens = fast(checkpoint)
    for place in PLACES:
        again, same = fast(checkpoint, **place)
        assert torch.equal(again, logits), place
        assert torch.equal(same, tokens), place


@pytest.mark.usefixtures("one_thread")
def test_the_same_bits_with_one_thread(checkpoint: Path) -> None:
    alone = fast(checkpoint, resident=0)
    torch.set_num_threads(2)
    assert torch.equal(fast(checkpoint, resident=0)[0], alone[0])


def test_near_transformers(checkpoint: Path) -> None:
    logits, tokens = fast(checkpoint)
    plain, expected = outputs(transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16))
    same = int((tokens == expected).all(0).long().cumprod(0).sum()) - PROMPT.shape[1]  # later steps see other tokens
    assert same > 0
    torch.testing.assert_close(logits[:same], plain[:same], rtol=0.05, atol=0.05)


def test_wrap_takes_it_too() -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(6)))
    x = torch.randn(3, 64)
    with torch.no_grad():
        expected = module(x)
        with offload.wrap(module, resident=0.5, exact=False) as wrapped:
            found = wrapped(x)
            assert any("forward" in child.__dict__ for child in wrapped)
        assert torch.equal(module(x), expected)
    torch.testing.assert_close(found, expected)
