"""Adapters beside frozen weights: the numbers of a plain loop, and what is saved is what PEFT reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import MODELS
from reference_loop import ReferenceLoop
from safetensors.torch import load_file
from test_full import batches, plain

import offload
from offload.finetune.lora import Lora, adapt, begin

B = torch.bfloat16


def adapted(folder: Path, lora: Lora, seed: int) -> Any:
    """The same model in plain memory."""
    model = plain(folder, B)
    for module in adapt(model, lora).values():
        for name in ("lora_A", "lora_B"):
            value = torch.empty(module._parameters[name].shape, dtype=B)
            module._parameters[name] = torch.nn.Parameter(value)
    begin({n: p.data for n, p in model.named_parameters() if n.endswith(("lora_A", "lora_B"))}, seed)
    return model


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "qwen3_moe"])
@pytest.mark.parametrize(("micro_batches", "clip"), [(1, 0.5), (3, None)])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_adapters_equal_a_plain_loop(
    kind: str, micro_batches: int, clip: float | None, dropout: float, tmp_path: Path
) -> None:
    MODELS[kind].save(tmp_path / "model", B)
    given = {"r": 4, "lora_alpha": 8, "lora_dropout": dropout, "target_modules": ["q_proj", "v_proj", "o_proj"]}
    loop = ReferenceLoop(adapted(tmp_path / "model", Lora(**given), 3), max_grad_norm=clip, seed=3, weight_decay=0.0)
    with offload.finetuning(
        tmp_path / "model", method="lora", lora=given, offload_dir=tmp_path / "state", seed=3, max_grad_norm=clip,
        resident=0, activations="recompute",
    ) as trainer:  # fmt: skip
        for step in range(3):
            result = trainer.step(batches(step, micro_batches), 1e-2)
            loop.step(batches(step, micro_batches), 1e-2)
            assert (result.loss, result.grad_norm) == (loop.losses[-1], loop.norms[-1]), step
        trainer.flush()
        mine = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        trainer.save(tmp_path / "out")
    theirs = dict(loop.model.named_parameters())
    assert all(torch.equal(p, theirs[n]) for n, p in mine.items())
    assert not all(torch.equal(p, torch.zeros_like(p)) for n, p in mine.items() if n.endswith("lora_B"))
    check_saved(tmp_path, mine, given)


def check_saved(folder: Path, trained: dict[str, torch.Tensor], given: dict[str, Any]) -> None:
    """PEFT's names; and W + (alpha / r) B A is the model that was trained."""
    config = json.loads((folder / "out" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert config["target_modules"] == sorted(given["target_modules"])
    found = load_file(folder / "out" / "adapter_model.safetensors")
    names = {n.removesuffix(".lora_A") for n in trained if n.endswith(".lora_A")}
    assert found.keys() == {f"base_model.model.{n}.lora_{k}.weight" for n in names for k in "AB"}
    base = dict(transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=B).named_parameters())
    for name in names:
        assert torch.equal(base[f"{name}.weight"], trained[f"{name}.weight"]), "frozen"
        assert torch.equal(found[f"base_model.model.{name}.lora_A.weight"], trained[f"{name}.lora_A"])


def test_a_resume_goes_on(tmp_path: Path) -> None:
    MODELS["llama"].save(tmp_path / "model", B)
    options: dict[str, Any] = {"method": "lora", "lora": {"r": 2}, "learning_rate": 1e-2}
    with offload.finetuning(tmp_path / "model", offload_dir=tmp_path / "a", **options) as whole:
        expected = [whole.step(batches(step, 1)).loss for step in range(4)]
    for first, last in ((0, 2), (2, 4)):
        with offload.finetuning(tmp_path / "model", offload_dir=tmp_path / "b", resume=True, **options) as part:
            assert [part.step(batches(step, 1)).loss for step in range(first, last)] == expected[first:last]
            part.commit()


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    MODELS["llama"].save(tmp_path / "model", B)
    options: dict[str, Any] = {"method": "lora", "offload_dir": tmp_path / "state"}
    with pytest.raises(offload.UsageError, match=r"query; there are .*q_proj"):
        offload.finetuning(tmp_path / "model", lora={"target_modules": ["query"]}, **options)
    with pytest.raises(offload.UsageError, match=r"lora\.rank is not known; did you mean lora\.r\?"):
        offload.finetuning(tmp_path / "model", lora={"rank": 4}, **options)
    with pytest.raises(offload.UsageError, match=r"lora\.r=0: expected int >= 1"):
        offload.finetuning(tmp_path / "model", lora={"r": 0}, **options)
    with pytest.raises(offload.UsageError, match='say method="lora"'):
        offload.finetuning(tmp_path / "model", offload_dir=tmp_path / "state", lora={"r": 4})
