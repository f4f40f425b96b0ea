"""Ragged passes: a sequence gets the same bits in any company, and what transformers gives it alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers
from models import MODELS

from offload.generate import Prompt
from offload.generate.choosing import Chooser
from offload.generate.continuous import passes
from offload.kernels.chosen import Kernels
from offload.runtime.pool import KeyValuePool, Runs
from offload.runtime.ragged import Ragged, Refused, Span, refuses

IDS = [[5 + (7 * i + j) % 300 for j in range(n)] for i, n in enumerate((3, 9, 1, 5, 17))]
REFUSED = {
    "gemma2": "caps scores",
    "bloom": "cannot be exchanged",
    "falcon": "cannot be exchanged",
}


def made(name: str, folder: Path, dtype: torch.dtype) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(MODELS[name].save(folder, dtype), dtype=dtype)


def ragged(model: transformers.PreTrainedModel, tokens: int = 120, *, exact: bool = False, layers: int = 5) -> Ragged:
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pool = KeyValuePool(layers=layers, kv_heads=heads, head_dim=dim, tokens=tokens, dtype=model.dtype)
    return Ragged(model, Kernels("cpu", exact=exact), pool)


def answers(found: Ragged, model: transformers.PreTrainedModel, prompts: Sequence[Prompt]) -> dict[int, list[int]]:
    choose = Chooser(model, new_tokens=6)
    done = [a for p in passes(found, choose, prompts, new_tokens=6, pass_tokens=20) for a in p.answers]
    return {a.prompt.index: a.tokens for a in done}


@pytest.mark.parametrize("name", sorted(MODELS))
def test_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    model = made(name, tmp_path, torch.float32)
    if name in REFUSED:
        assert REFUSED[name] in (refuses(model) or "")
        return
    assert refuses(model) is None
    prompts = [Prompt(index=i, line=i + 1, ids=tuple(ids)) for i, ids in enumerate(IDS)]
    expected = {
        i: model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=6)[0, len(ids) :]
        for i, ids in enumerate(IDS)
    }
    with ragged(model) as found:
        assert answers(found, model, prompts) == {i: row.tolist() for i, row in expected.items()}
        found.pool.runs.check_integrity()
        assert found.pool.runs.free == 120


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gpt2", "gpt_neox"])
def test_company_changes_no_bit(name: str, exact: bool, tmp_path: Path) -> None:
    model = made(name, tmp_path, torch.bfloat16)
    alone = []
    with ragged(model, exact=exact) as found:
        for ids in IDS:
            span = Span(found.pool.runs.take(40))  # type: ignore[arg-type]
            alone.append([found.forward([(span, ids)]), found.forward([(span, [7])]), found.forward([(span, [9])])])
            found.pool.runs.give(span.start)
    with ragged(model, 200, exact=exact) as found:
        found.pool.runs.take(5)
        spans = [Span(found.pool.runs.take(40)) for _ in range(4)]  # type: ignore[arg-type]
        first = found.forward([(s, ids) for s, ids in zip(spans[:2], IDS, strict=False)])
        mixed = found.forward([(spans[0], [7]), (spans[2], IDS[2]), (spans[1], [7]), (spans[3], IDS[3])])
        last = found.forward([(spans[3], [7]), (spans[2], [7]), (spans[0], [9])])
    for got, expected in (
        (first[0], alone[0][0]), (first[1], alone[1][0]), (mixed[0], alone[0][1]), (mixed[1], alone[2][0]),
        (mixed[2], alone[1][1]), (mixed[3], alone[3][0]), (last[0], alone[3][1]), (last[1], alone[2][1]),
        (last[2], alone[0][2]),
    ):  # fmt: skip
        assert torch.equal(got, expected[0])
    assert [span.length for span in spans] == [5, 10, 2, 6]
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_the_last_layer_runs_for_last_tokens_alone(name: str, tmp_path: Path) -> None:
    model = made(name, tmp_path, torch.float32)
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 5)
    rows: list[tuple[int, int]] = []
    for number in (0, 4):
        hook = lambda m, args, out, number=number: rows.append((number, args[0].shape[1]))  # noqa: E731
        layers[number].mlp.register_forward_hook(hook)
    own = layers[4].forward
    with ragged(model) as found:
        spans = [Span(found.pool.runs.take(20)) for _ in range(2)]  # type: ignore[arg-type]
        found.forward([(spans[0], IDS[4]), (spans[1], IDS[1])])
        found.forward([(spans[1], [7]), (spans[0], [7])])
    assert [pair for pair in rows if pair[0] == 0] == [(0, 26), (0, 8)]
    assert [pair for pair in rows if pair[0] == 4] == [(4, 8), (4, 8)]
    assert layers[4].forward == own


def test_a_model_of_other_layers_than_planned_is_refused(tmp_path: Path) -> None:
    model = made("llama", tmp_path, torch.float32)
    for layers, says in ((6, "5 of its 6 layers"), (4, "layer 4 has keys")):
        with ragged(model, layers=layers) as found, pytest.raises(Refused, match=says):
            found.forward([(Span(0), [5, 6, 7])])
    assert model.config._attn_implementation == "sdpa"


def test_a_model_that_does_not_say_what_it_keeps_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("llama", tmp_path, torch.float32)
    assert refuses(model) is None
    monkeypatch.delattr(transformers.PreTrainedModel, "_is_stateful")
    assert "another state" in str(refuses(model))


def test_runs_are_lent_and_joined_again() -> None:
    runs = Runs(10)
    a, b, c = runs.take(3), runs.take(4), runs.take(3)
    assert (a, b, c, runs.free, runs.take(1)) == (0, 3, 7, 0, None)
    runs.give(0)
    runs.give(7)
    runs.check_integrity()
    assert (runs.free, runs.take(4)) == (6, None)
    runs.give(3)
    runs.check_integrity()
    assert runs.take(10) == 0
