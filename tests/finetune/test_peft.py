"""Adapters that we write, loaded by PEFT itself: the loss of the model that was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import MODELS
from test_full import batches

import offload

peft = pytest.importorskip("peft")


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]], ids=str)
def test_peft_loads_them_and_computes_the_same(kind: str, dtype: torch.dtype, targets: Any, tmp_path: Path) -> None:
    model = MODELS[kind].save(tmp_path / "model", dtype)
    lora = {"r": 4, "lora_alpha": 8, "target_modules": targets}
    ids = batches(0, 1)[0]["input_ids"]
    with offload.finetuning(
        model, method="lora", lora=lora, offload_dir=tmp_path / "state", learning_rate=1e-2, resident_weights=0
    ) as trainer:
        for step in range(3):
            trainer.step(batches(step, 1))
        trainer.save(tmp_path / "out")
        loss, tokens = trainer.evaluate(batches(9, 1))
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    with torch.no_grad():
        before = base(ids).logits.clone()
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "out", autocast_adapter_dtype=False).eval()
        assert float(adapted(**batches(9, 1)[0]).loss) == pytest.approx(loss / tokens, rel=1e-6, abs=0)
        assert not torch.equal(adapted(ids).logits, before)
