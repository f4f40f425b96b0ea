"""Kernels for products that are no nn.Linear: experts and Conv1D compute by them, and are left as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
from transformers.pytorch_utils import Conv1D

from offload.kernels.chosen import Kernels
from offload.kernels.cpu.linear_many import has_pairs
from offload.runtime import conv1d, experts

pytestmark = pytest.mark.skipif(not has_pairs(), reason="this processor does not multiply pairs of bf16")


def mixture(tokens: int) -> tuple[Any, tuple[torch.Tensor, ...]]:
    """Six experts of which each token chooses two, and what they are given."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(hidden_size=64, moe_intermediate_size=96, num_experts=6, num_experts_per_tok=2)
    config._experts_implementation = "grouped_mm"
    module = Qwen3MoeExperts(config).bfloat16().requires_grad_(False)
    for parameter in module.parameters():
        parameter.normal_(std=0.1)
    chosen = torch.stack([torch.randperm(6)[:2] for _ in range(tokens)])
    return module, (torch.randn(tokens, 64).bfloat16(), chosen, torch.rand(tokens, 2).bfloat16())


@pytest.mark.parametrize("tokens", [1, 5, 60])
def test_experts_compute_what_transformers_does(tokens: int) -> None:
    module, given = mixture(tokens)
    expected, known = module(*given), set(ALL_EXPERTS_FUNCTIONS._global_mapping)
    kernels = Kernels("cpu", exact=False)
    remove = experts.install(module, kernels)
    assert module.config._experts_implementation != "grouped_mm"
    torch.testing.assert_close(module(*given), expected, rtol=0.02, atol=0.02)
    assert "not" not in kernels.report()["linear_groups"], "nothing was refused"
    remove()
    assert module.config._experts_implementation == "grouped_mm"
    assert set(ALL_EXPERTS_FUNCTIONS._global_mapping) == known
    assert torch.equal(module(*given), expected)


def test_experts_of_another_form_are_left_to_transformers() -> None:
    module, given = mixture(3)
    expected = module(*given)
    kernels = Kernels("cpu", exact=False)
    remove = experts.install(module, kernels)
    module.has_post_expert_norm = True
    module.post_expert_norm = torch.nn.Identity()
    assert torch.equal(module(*given), expected)
    assert "unusual form" in kernels.report()["linear_groups"]
    module.has_post_expert_norm = False
    module.requires_grad_(True)
    module(*given).sum().backward()
    assert module.down_proj.grad is not None
    remove()


def test_exact_models_keep_their_experts() -> None:
    module, _ = mixture(3)
    experts.install(module, Kernels("cpu", exact=True))()
    assert module.config._experts_implementation == "grouped_mm"


@pytest.mark.parametrize("rows", [1, 4, 9])
def test_conv1d(rows: int) -> None:
    torch.manual_seed(0)
    module = Conv1D(64, 96).bfloat16().requires_grad_(False)
    module.bias.normal_()
    x = torch.randn(rows, 1, 96).bfloat16()
    expected = module(x)
    remove = conv1d.install(module, Kernels("cpu", exact=False))
    assert "forward" in module.__dict__
    torch.testing.assert_close(module(x), expected, rtol=0.02, atol=0.02)
    remove()
    assert "forward" not in module.__dict__
    conv1d.install(module, Kernels("cpu", exact=True))
    assert "forward" not in module.__dict__
