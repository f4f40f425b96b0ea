"""The first invariant on a real GPU: offloaded output equals that of the model wholly on the card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import MODELS

import offload
from offload.cli import main

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

PROMPT = torch.tensor([[0, 0, 0, 5, 9, 200, 31, 7], [44, 45, 46, 47, 48, 49, 300, 51]])
MASK = (torch.arange(8) >= torch.tensor([[3], [0]])).long()
MIB = 1 << 20
PLACES: dict[str, dict[str, Any]] = {
    "everything on the card": {"gpu_memory": "64MiB"},
    "little on the card, the rest in memory": {"gpu_memory": "1300KB"},
    "little on the card, the rest on disk": {"gpu_memory": "1300KB", "resident": 0},
    "no prefetch": {"gpu_memory": "1300KB", "resident": 0, "slots": 1},
}


def outputs(model: Any) -> dict[str, torch.Tensor]:
    ids, mask = PROMPT.to(model.device), MASK.to(model.device)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
    tokens = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
    return {"logits": logits, "greedy": tokens}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma2", "gpt2", "opt", "bloom", "qwen3_moe"])
@pytest.mark.parametrize("place", list(PLACES))
def test_offloaded_equals_on_the_card(name: str, dtype: torch.dtype, place: str, tmp_path: Path) -> None:
    checkpoint = MODELS[name].save(tmp_path)
    expected = outputs(transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).to("cuda"))
    options = dict(PLACES[place])
    while True:  # the least memory that works for this model
        try:
            handle = offload.load(checkpoint, exact=True, dtype=dtype, device="cuda", batch=2, context=32, **options)
            break
        except offload.BudgetError:
            size = int(str(options["gpu_memory"]).removesuffix("KB")) + 100
            assert size < 4000
            options["gpu_memory"] = f"{size}KB"
    with handle as model:
        assert model.device.type == "cuda"
        found = outputs(model)
        again = outputs(model)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
        assert torch.equal(again[key], value), f"{key}, second time"


def test_many_prompts_share_passes_on_the_card(tmp_path: Path) -> None:
    """Rows of a pass are in one matrix on the card, and keys and values lie there; tokens are those of the CPU."""
    checkpoint = MODELS["llama"].save(tmp_path / "model")
    prompts = tmp_path / "prompts.jsonl"
    ids = [[5 + (7 * i + j) % 300 for j in range(n)] for i, n in enumerate((3, 9, 4, 9, 1, 5, 2))]
    prompts.write_text("".join(json.dumps({"prompt_ids": one}) + "\n" for one in ids))
    found = []
    for device, options in (("cpu", []), ("cuda", ["--gpu-memory", "900KB", "--resident", "0.5"])):
        out = tmp_path / f"{device}.jsonl"
        arguments = ["generate", *map(str, (checkpoint, prompts)), "-o", str(out), "--device", device, *options]
        with pytest.raises(SystemExit) as end:
            main([*arguments, "--max-new-tokens", "6", "--json"])
        assert end.value.code in (0, None)
        found.append([json.loads(line)["tokens"] for line in out.read_text().splitlines()])
    assert found[0] == found[1]


@pytest.mark.parametrize("resident", [0, 0.5])
def test_wrap_on_the_card(resident: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(*[torch.nn.Linear(256, 256) for _ in range(12)]).eval()
    x = torch.randn(5, 256, device="cuda")
    with torch.no_grad():
        expected = module.to("cuda")(x)
        module.to("cpu")
        options = {"device": "cuda", "gpu_memory": "1MiB", "resident": resident}
        with offload.wrap(module, exact=True, offload_dir=tmp_path, **options) as wrapped:
            for _ in range(20):
                assert torch.equal(wrapped(x), expected)
    assert all(p.device.type == "cpu" for p in module.parameters())


def test_peak_stays_below_the_budget(tmp_path: Path) -> None:
    """Weights four times the budget: what torch allocates stays under it."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(*[torch.nn.Linear(2048, 2048, bias=False) for _ in range(32)]).eval()
    x = torch.randn(16, 2048, device="cuda")
    budget = 128 * MIB
    with (
        torch.no_grad(),
        offload.wrap(module, exact=True, offload_dir=tmp_path, device="cuda", gpu_memory=budget) as wrapped,
    ):
        torch.cuda.reset_peak_memory_stats()
        for _ in range(5):
            wrapped(x)
        assert torch.cuda.max_memory_allocated() <= budget
