"""Training on a real GPU: offloaded equals the same with everything on the card, and memory stays below the budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import MODELS
from test_device import accelerated, least
from test_full import NUMBERS, B, F, batches, rate

import offload

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

MIB = 1 << 20
STEPS = 4
PLACES: dict[str, dict[str, Any]] = {
    "a ring on the card": {"share": 0.0},
    "half on the card": {"share": 0.5},
    "one thing at a time": {"share": 0.0, "overlap": False},
    "a ring in memory too": {"share": 0.0, "resident": 0, "resident_weights": 0.0},
}


def trained(folder: Path, kind: str, dtype: torch.dtype, count: int, **options: Any) -> tuple[Any, Any]:
    """Losses and norms of a few steps, and the weights behind them."""
    with accelerated(folder, kind, dtype, device="cuda", overwrite=True, **options) as trainer:
        assert trainer.training.device.torch_device.type == "cuda"
        found = [trainer.step(batches(step, count), rate(step)) for step in range(STEPS)]
        weights = {n: w.detach().cpu().clone() for n, w in trainer.weights().items()}
    return [(r.loss, r.grad_norm) for r in found], weights


@pytest.mark.parametrize("clip", [0.5, None], ids=["clip", "no clip"])
@pytest.mark.parametrize(
    ("kind", "dtype", "count"), [("llama", B, 1), ("llama-tied", B, 2), ("gpt2", F, 1), ("qwen3_moe", B, 2)]
)
@pytest.mark.parametrize("place", list(PLACES))
def test_offloaded_equals_all_on_the_card(
    place: str, kind: str, dtype: torch.dtype, count: int, clip: float | None, tmp_path: Path
) -> None:
    options = {"max_grad_norm": clip, "seed": 5}
    expected, wanted = trained(tmp_path, kind, dtype, count, share=1.0, gpu_memory="1GiB", **options)
    found, weights = trained(tmp_path, kind, dtype, count, **PLACES[place], **options)
    assert found == expected
    assert all(torch.equal(weights[n], w) for n, w in wanted.items())


@pytest.mark.parametrize("clip", [0.5, None], ids=["clip", "no clip"])
def test_it_learns_as_on_the_cpu(clip: float | None, tmp_path: Path) -> None:
    """Other kernels round otherwise; losses stay close."""
    MODELS["llama"].save(tmp_path / "model", B)
    found = []
    for options in ({"device": "cpu"}, {"device": "cuda", "gpu_memory": "64MiB"}):
        given = {"offload_dir": tmp_path / f"{len(found)}", "max_grad_norm": clip, **NUMBERS, **options}
        with offload.finetuning(tmp_path / "model", **given) as trainer:
            found.append([trainer.step(batches(0, 1), 1e-3).loss for _ in range(8)])
    assert found[1] == pytest.approx(found[0], rel=2e-2)
    assert found[1][-1] < found[1][0]


def test_commits_and_resumes(tmp_path: Path) -> None:
    options: dict[str, Any] = {"device": "cuda", "share": 0.3, "resident": 0.5}
    with accelerated(tmp_path, "llama", B, **options) as trainer:
        for step in range(2):
            trainer.step(batches(step, 1), rate(step))
        trainer.commit()
        expected = [trainer.step(batches(step, 1), rate(step)).loss for step in (2, 3)]
    with accelerated(tmp_path, "llama", B, resume=True, **options) as trainer:
        assert [trainer.step(batches(step, 1), rate(step)).loss for step in (2, 3)] == expected


def test_peak_stays_below_the_budget(tmp_path: Path) -> None:
    """Weights several times the budget: what torch allocates stays under it."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=2048, hidden_size=1024, intermediate_size=4096, num_hidden_layers=16, num_attention_heads=8
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "model")
    ids = torch.randint(3, 2000, (1, 128))
    given = {"device": "cuda", "offload_dir": tmp_path / "state", "tokens": 128}
    with pytest.raises(offload.BudgetError) as error:
        offload.finetuning(tmp_path / "model", gpu_memory="8MiB", **given)
    budget = least(str(error.value)) + 32 * MIB
    with offload.finetuning(tmp_path / "model", gpu_memory=budget, **given) as trainer:
        trainer.step({"input_ids": ids, "labels": ids})
        torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            trainer.step({"input_ids": ids, "labels": ids})
        assert torch.cuda.max_memory_allocated() <= budget
