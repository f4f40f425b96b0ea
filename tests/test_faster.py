"""Kernels inside of whole models: who they take over from, who they leave alone, and that they go away again."""

import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from forks import Forks
from models import MODELS
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama import modeling_llama
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

import offload
from offload.kernels.chosen import Kernels
from offload.runtime import faster, gates, norms, rotaries
from offload.runtime.lookups import Vanished, said

pytestmark = pytest.mark.usefixtures("two_threads")
KERNELS = Kernels("cpu", exact=False)


def random_weights(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(1 + torch.randn_like(parameter) / 4)
    return module.requires_grad_(False)


@pytest.mark.parametrize(
    ("make", "is_taken"),
    [
        (lambda: modeling_llama.LlamaRMSNorm(64), True),
        (lambda: Olmo2RMSNorm(64), True),  # rounds once less: within the rounding of one number
        (lambda: nn.RMSNorm(64, eps=1e-6), True),
        (lambda: GemmaRMSNorm(64), False),  # by 1 + weight
        (lambda: nn.LayerNorm(64, bias=False), False),  # subtracts the mean
        (lambda: nn.RMSNorm(8, eps=1e-6), False),  # too narrow for the kernel
    ],
)
def test_norms_are_known_by_what_they_compute(make: Callable[[], nn.Module], is_taken: bool) -> None:
    torch.manual_seed(0)
    module = random_weights(make()).bfloat16()
    given = module.weight
    x = torch.randn(2, 3, given.shape[0]).bfloat16()
    expected = module(x)
    remove = norms.install(module, KERNELS)
    assert ("forward" in module.__dict__) == is_taken
    assert module.weight is given
    torch.testing.assert_close(module(x), expected, rtol=2.0**-6, atol=0)
    remove()
    assert "forward" not in module.__dict__
    assert torch.equal(module(x), expected)


@pytest.mark.parametrize(("activation", "is_taken"), [("silu", True), ("gelu", False)])
def test_gates_are_known_by_what_they_compute(activation: str, is_taken: bool) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(hidden_size=64, intermediate_size=96, hidden_act=activation)
    module = modeling_llama.LlamaMLP(config).bfloat16().requires_grad_(False)
    many, few = torch.randn(1, 9, 64).bfloat16(), torch.randn(1, 2, 64).bfloat16()
    expected, of_few = module(many), module(few)
    remove = gates.install(module, KERNELS)
    assert ("forward" in module.__dict__) == is_taken
    assert not any("forward" in child.__dict__ for child in module.children())
    torch.testing.assert_close(module(many), expected, rtol=2.0**-5, atol=2.0**-7)
    assert torch.equal(module(few), of_few)
    given = many.clone().requires_grad_()
    module(given).sum().backward()
    assert given.grad is not None
    remove()
    assert torch.equal(module(many), expected)


def test_a_layer_that_cannot_be_tried_out_is_left_alone() -> None:
    class Pooled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = torch.nn.SiLU()
            self.gate, self.up, self.down = (torch.nn.Linear(16, 16) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(self.act(self.gate(x)) * self.up(x)) / x.shape[2]  # an IndexError for a matrix

    module = Pooled()
    gates.install(module, KERNELS)
    assert all("forward" not in m.__dict__ for m in module.modules())


def test_a_layer_that_gates_otherwise_is_left_alone() -> None:
    class Sum(modeling_llama.LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))

    module = Sum(transformers.LlamaConfig(hidden_size=64, intermediate_size=96))
    gates.install(module, KERNELS)
    assert "forward" not in module.__dict__


def test_gradients_go_through_the_models_own_ops() -> None:
    norm = random_weights(modeling_llama.LlamaRMSNorm(64))
    remove = norms.install(norm, KERNELS)
    x = torch.randn(2, 64, requires_grad=True)
    norm(x).sum().backward()
    assert x.grad is not None
    remove()


def test_rotary_is_bound_until_the_last_session_ends() -> None:
    own = modeling_llama.apply_rotary_pos_emb
    module = modeling_llama.LlamaRMSNorm(64)
    first, second = rotaries.install(module, KERNELS), rotaries.install(module, KERNELS)
    assert modeling_llama.apply_rotary_pos_emb is not own
    first()
    assert modeling_llama.apply_rotary_pos_emb is not own
    second()
    assert modeling_llama.apply_rotary_pos_emb is own


def generated(model: Any, **options: Any) -> Any:
    ids = torch.tensor([[0, 0, 0, 47, 48, 49, 300, 51], [5, 9, 200, 31, 7, 44, 3, 8]])
    return model.generate(
        ids, attention_mask=(ids != 0).long(), max_new_tokens=12, min_new_tokens=12, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True, **{"do_sample": False} | options,
    )  # fmt: skip


ARCHITECTURES = [
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "gpt_neox", "opt", "bloom", "falcon",
    "starcoder2", "cohere", "olmo2", "mixtral", "qwen3_moe",
]  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_padded_batches_are_near_transformers(name: str, tmp_path: Path) -> None:
    """A prompt with padding and eleven steps: logits stay near as long as the tokens agree, beyond any window."""
    checkpoint = MODELS[name].save(tmp_path / name)
    expected = generated(transformers.AutoModelForCausalLM.from_pretrained(checkpoint))
    with offload.load(checkpoint, context=32, batch=2) as model:
        found = generated(model)
    assert torch.equal(found.sequences, expected.sequences)
    for got, want in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"use_cache": False}, {"prompt_lookup_num_tokens": 2}], ids=str)
def test_other_ways_to_generate(options: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = MODELS["llama"].save(tmp_path / "llama")
    ids = torch.tensor([[5, 9, 200, 31, 9, 200, 31, 8]])
    how = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, **options}
    expected = transformers.AutoModelForCausalLM.from_pretrained(checkpoint).generate(ids, **how)
    with offload.load(checkpoint, context=32, batch=3) as model:
        assert torch.equal(model.generate(ids, **how), expected)


def test_who_computed_is_told_and_all_is_removed(tmp_path: Path) -> None:
    checkpoint = MODELS["qwen3"].save(tmp_path / "qwen3")
    before = (
        set(transformers.AttentionInterface._global_mapping),
        set(transformers.AttentionMaskInterface._global_mapping),
    )
    with (handle := offload.load(checkpoint, context=32, batch=2)) as model:
        generated(model)
        told = handle.session.kernels.report()
        assert {op for op, how in told.items() if how.startswith("cpu")} >= {
            "linear", "linears", "rms_norm", "rotary", "decode_attention",
        }  # fmt: skip
        assert model.config._attn_implementation != "sdpa"
    assert model.config._attn_implementation == "sdpa"
    assert not any("forward" in module.__dict__ for module in model.modules())
    after = (
        set(transformers.AttentionInterface._global_mapping),
        set(transformers.AttentionMaskInterface._global_mapping),
    )
    assert after == before
    file = inspect.getmodule(type(model))
    assert file is not None
    assert file.apply_rotary_pos_emb.__module__ == file.__name__
    assert not hasattr(file.apply_rotary_pos_emb, "__wrapped__")


@pytest.mark.parametrize(("name", "what", "own"), [("llama", "attn", "sdpa"), ("qwen3_moe", "experts", "grouped_mm")])
@pytest.mark.parametrize("kept", ["elsewhere", None], ids=["renamed", "unheeded"])
def test_a_private_name_that_vanishes_is_told(
    name: str, what: str, own: str, kept: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later transformers keeps it under another name, or has it and does not look."""
    checkpoint, public = MODELS[name].save(tmp_path / name), f"_{what}_implementation"
    kept = kept or f"{public}_internal"
    seen = property(lambda config: own, lambda config, value: config.__dict__.update({kept: value}))
    monkeypatch.setattr(transformers.PreTrainedConfig, public, seen)
    told = f"does not heed {public}_internal, so its own ops compute"
    with (handle := offload.load(checkpoint, context=32, batch=2)) as model:
        assert [f for f in handle.fallbacks if told in f]
        generated(model)
        assert handle.session.kernels.report()["linear"].startswith("cpu")
    with pytest.raises(offload.StrictError, match=told):
        offload.load(checkpoint, context=32, batch=2, strict=True)


def test_a_configuration_that_says_nothing_is_told() -> None:
    with pytest.raises(Vanished, match="does not heed _attn_implementation, so"):
        said(SimpleNamespace(get_text_config=None), "attn")
    assert said(SimpleNamespace(), "attn") is None


def test_exact_kernels_change_products_only() -> None:
    module = nn.Sequential(nn.Linear(32, 32, bias=False), nn.RMSNorm(32, eps=1e-6))
    remove = faster.install(module, Kernels("cpu", exact=True), has_faces=False, planned_tokens=0, lacks=[])
    assert "forward" not in module[1].__dict__
    assert not module._forward_pre_hooks
    remove()


def test_attention_masks_with_holes_are_left_to_the_model(tmp_path: Path) -> None:
    checkpoint = MODELS["llama"].save(tmp_path / "llama")
    ids = torch.tensor([[5, 9, 200, 31, 7]])
    mask = torch.tensor([[1, 1, 0, 1, 1, 1]])
    plain = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)

    def step(model: Any) -> torch.Tensor:
        with torch.no_grad():
            cache = model(ids, attention_mask=mask[:, :5]).past_key_values
            return model(torch.tensor([[8]]), attention_mask=mask, past_key_values=cache).logits

    with (handle := offload.load(checkpoint, context=32)) as model:
        torch.testing.assert_close(step(model), step(plain), rtol=1e-4, atol=1e-4)
        assert "a mask with holes" in handle.session.kernels.report()["decode_attention"]


LATE = """
import sys
import torch
from numba.core import caching
from offload.api import load
handle = load(sys.argv[1], cpu_memory="2GiB", context=16, prompt_tokens=12)
late, own = [], caching.Cache.load_overload
def noted(self, *arguments):
    late.append(self._name)
    return own(self, *arguments)
caching.Cache.load_overload = noted
with handle:
    handle.model.generate(torch.ones(1, 12, dtype=torch.int64), max_new_tokens=2, do_sample=False)
print(late)
"""


def test_no_kernel_is_loaded_in_a_first_prompt(tmp_path: Path, forks: Forks) -> None:
    """Each takes milliseconds to fetch from its cache, which loading the model hides."""
    done = forks.run(LATE, MODELS["llama"].save(tmp_path, torch.bfloat16))
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
