"""What is left of a run in which something failed: never weights of which some are a step ahead of others."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MODELS
from test_full import batches
from test_travel import Backwards

import offload

Tensors = dict[str, torch.Tensor]


@pytest.mark.parametrize("clip", [0.5, None], ids=["clip", "no clip"])
def test_nothing_comes_of_a_run_whose_evaluation_failed(clip: float | None, tmp_path: Path) -> None:
    model = MODELS["llama"].save(tmp_path / "model", torch.bfloat16)
    given = {"offload_dir": tmp_path / "state", "device": "cpu", "max_grad_norm": clip, "tokens": 48}
    with offload.finetuning(model, **given) as mine:
        mine.step(batches(0, 1))
        mine.commit()
        mine.step(batches(1, 1))
        (batch,) = batches(9, 1)
        head = mine.model.get_output_embeddings().register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            mine.evaluate([batch])
        head.remove()
        for go_on in (lambda: mine.step(batches(2, 1)), mine.commit, mine.flush, lambda: mine.save(tmp_path / "out")):
            with pytest.raises(offload.ModelError, match=r"evaluation after step 2 failed.* last commit, step 1"):
                go_on()
    with offload.finetuning(model, **given, resume=True) as mine:
        assert mine.step_number == 1


@pytest.mark.parametrize("clip", [0.5, None], ids=["clip", "no clip"])
@pytest.mark.parametrize("where", [{"device": "cpu"}, {"device": "emulated", "gpu_memory": "300KiB"}])
def test_a_module_gets_whole_weights_or_none(where: dict[str, Any], clip: float | None, tmp_path: Path) -> None:
    """With clipping, gradients lie where weights were until the next step."""

    def train(folder: str, *, ends: bool = False, breaks: bool = False) -> tuple[torch.nn.Module, Tensors]:
        torch.manual_seed(0)
        module = Backwards()
        first = {n: p.detach().clone() for n, p in module.named_parameters()}
        with (
            contextlib.suppress(ValueError, offload.ModelError),
            offload.finetuning(module, offload_dir=tmp_path / folder, max_grad_norm=clip, **where) as mine,
        ):
            mine.step({"x": torch.ones(2, 8)}, 1e-3)
            if breaks:
                mine.step({"x": torch.full((2, 8), torch.nan)}, 1e-3)
            if ends:
                raise ValueError("of the user")
        return module, first

    whole, first = train("whole")
    ended, _ = train("ended", ends=True)
    broken, _ = train("broken", breaks=True)
    expected = dict(whole.named_parameters())
    assert not torch.equal(expected["blocks.0.weight"], first["blocks.0.weight"])
    assert all(torch.equal(p, expected[n]) for n, p in ended.named_parameters())
    assert all(torch.equal(p, first[n]) for n, p in broken.named_parameters())
