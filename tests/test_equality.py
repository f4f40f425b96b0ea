"""The first invariant: offloaded output equals in-memory output, bit for bit, for every architecture and every tier."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import MODELS

import offload
import offload.handle
from offload.planner.placement import TooSmall

PROMPT = torch.tensor([[0, 0, 0, 5, 9, 200, 31, 7], [44, 45, 46, 47, 48, 49, 300, 51]])  # the first row is left-padded
MASK = (torch.arange(8) >= torch.tensor([[3], [0]])).long()

PLACES: dict[str, dict[str, Any]] = {
    "all on disk": {"resident": 0},
    "a quarter in memory": {"resident": 0.25},
    "no prefetch": {"resident": 0.5, "slots": 1},
    "device, host and disk": {"device": "emulated", "resident": 0.9},
    "everything fits": {},
}
WITH_TWO_THREADS = ("llama", "gemma3", "bloom", "mixtral")


@pytest.fixture(scope="module", params=list(MODELS))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint of many files, made once for all places."""
    before = torch.get_num_threads()
    torch.set_num_threads(2 if request.param in WITH_TWO_THREADS else 1)
    yield MODELS[request.param].save(tmp_path_factory.mktemp(request.param))
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> dict[str, torch.Tensor]:
    """What plain transformers makes of it."""
    return outputs(transformers.AutoModelForCausalLM.from_pretrained(checkpoint))


def outputs(model: Any) -> dict[str, torch.Tensor]:
    """Logits of a padded batch, and tokens by three ways of decoding."""
    with torch.no_grad():
        logits = model(PROMPT, attention_mask=MASK).logits
        again = model(PROMPT[:, :5], attention_mask=MASK[:, :5]).logits
    tokens = {}
    for name, options in {
        "greedy": {"do_sample": False},
        "sampled": {"do_sample": True, "temperature": 0.8},
        "beams": {"do_sample": False, "num_beams": 3},
    }.items():
        torch.manual_seed(7)
        tokens[name] = model.generate(PROMPT, attention_mask=MASK, max_new_tokens=5, pad_token_id=0, **options)
    return {"logits": logits, "shorter": again, **tokens}


@pytest.mark.parametrize("place", list(PLACES))
def test_offloaded_equals_in_memory(checkpoint: Path, expected: dict[str, torch.Tensor], place: str) -> None:
    with load(checkpoint, **PLACES[place]) as model:
        found = outputs(model)
    for name, value in expected.items():
        difference = (found[name].float() - value.float()).abs()
        assert torch.equal(found[name], value), f"{name}: max {difference.max():.3g}, mean {difference.mean():.3g}"


def load(checkpoint: Path, **options: Any) -> offload.handle.Offloaded:
    """Loads; a device gets the least memory that works, so that all its tiers are in use."""
    gpu_memory = 1 << 16
    while True:
        device = {"gpu_memory": gpu_memory} if "device" in options else {}
        try:
            return offload.load(checkpoint, exact=True, batch=8, context=32, **options, **device)
        except offload.BudgetError as error:
            behind = error.__context__
            if not isinstance(behind, TooSmall) or not behind.is_device:
                raise
            gpu_memory += behind.missing
