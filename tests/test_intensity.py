"""Operations and bytes of a unit, beside sums by hand."""

from __future__ import annotations

from pathlib import Path

import headers
import pytest

from offload.checkpoint.numbers import numbers
from offload.planner.intensity import intensity
from offload.planner.ops import Phase
from offload.specs import ModelSpec


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return numbers(headers.write(tmp_path_factory.mktemp("dense"), headers.LLAMA_70B)).spec


def test_a_layer_that_decodes(dense: ModelSpec) -> None:
    layer = next(u for u in dense.units if u.layers)
    matrices = 2 * 8192 * 8192 + 2 * 1024 * 8192 + 3 * 28672 * 8192
    found = intensity(layer, dense, Phase(sequences=4, tokens=1, past=100))
    assert found.flops == 2 * matrices * 4 + 4 * 64 * 128 * 4 * 101
    assert found.nbytes == 2 * (matrices + 2 * 8192) + 2 * 2 * 8 * 128 * 4 * 101


def test_a_layer_that_reads_prompts(dense: ModelSpec) -> None:
    layer = next(u for u in dense.units if u.layers)
    matrices = 2 * 8192 * 8192 + 2 * 1024 * 8192 + 3 * 28672 * 8192
    found = intensity(layer, dense, Phase(sequences=1, tokens=512))
    assert found.flops == 2 * matrices * 512 + 4 * 64 * 128 * (512 * 513 / 2)  # each token sees those before it
    assert found.flops / found.nbytes == pytest.approx(512, rel=0.05)


def test_the_head_makes_logits_of_the_last_token_only(dense: ModelSpec) -> None:
    head = dense.units[-1]
    assert intensity(head, dense, Phase(sequences=2, tokens=512)).flops == 2 * 128256 * 8192 * 2


def test_experts_that_nobody_chose_are_not_read(tmp_path: Path) -> None:
    spec = numbers(headers.write(tmp_path / "m", headers.MOE_160 | {"num_hidden_layers": 3})).spec
    layer = next(u for u in spec.units if u.layers)
    experts = 160 * 3 * 1536 * 4096
    rest = sum(t.nbytes for t in layer.tensors if not t.experts)
    one = intensity(layer, spec, Phase(sequences=1, tokens=1))
    assert one.nbytes == pytest.approx(2 * experts * 8 / 160 + rest + 2 * 2 * 4 * 128)
    many = intensity(layer, spec, Phase(sequences=1, tokens=10_000))
    assert many.nbytes == pytest.approx(2 * experts + rest + 2 * 2 * 4 * 128 * 10_000)
