"""The loss in pieces has torch's bits, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MODELS
from transformers.loss.loss_utils import ForCausalLMLoss

from offload.runtime import losses


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def both(logits: torch.Tensor, labels: torch.Tensor, scale: float, **options: Any) -> None:
    found = []
    for loss in (ForCausalLMLoss, losses.causal_loss):
        given = logits.clone().requires_grad_()
        value = loss(given, labels, logits.shape[-1], **options)
        (gradient,) = torch.autograd.grad(value, given, torch.tensor(scale, dtype=value.dtype))
        found.append((value.detach(), gradient))
    (value, gradient), (mine, other) = found
    assert torch.equal(mine, value)
    assert torch.equal(other, gradient)
    assert torch.equal(torch.signbit(other), torch.signbit(gradient))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize(("batch", "tokens", "words"), [(2, 37, 1003), (1, 2, 7), (3, 500, 64), (2, 65, 49152)])
def test_pieces_have_the_same_bits(
    batch: int, tokens: int, words: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = torch.Generator().manual_seed(words)
    logits = (3 * torch.randn(batch, tokens, words, generator=random)).to(dtype)
    labels = torch.randint(0, words, (batch, tokens), generator=random)
    labels[torch.rand(batch, tokens, generator=random) < 0.3] = -100
    labels[0, 1] = 1
    for piece in (losses.PIECE, 3 * words, 1):
        monkeypatch.setattr(losses, "PIECE", piece)
        both(logits, labels, 0.37)
    both(logits, labels, 1.0, num_items_in_batch=torch.tensor(11))
    both(logits, labels.masked_fill(labels < 0, 2), 1.0, num_items_in_batch=11, ignore_index=2)
    both(logits, labels, 0.5, shift_labels=labels.roll(1, -1))


def test_a_model_gets_its_own_loss_back(tmp_path: Path) -> None:
    import transformers

    MODELS["llama"].save(tmp_path, torch.bfloat16)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    back = losses.use_pieces(model)
    assert model.loss_function is losses.causal_loss
    back()
    assert model.loss_function is ForCausalLMLoss
    model.loss_function = mine = lambda *_: None
    losses.use_pieces(model)()
    assert model.loss_function is mine
    losses.use_pieces(torch.nn.Linear(2, 2))()
