"""Rows and steps: packing keeps every token and every loss, and any position leads to the same rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from models import MODELS
from tiny_text import tokenizer

from offload.errors import DataError, ModelError
from offload.finetune import rows as rows_module
from offload.finetune.batches import collate, steps, steps_of
from offload.finetune.encoding import IGNORED, Encoder
from offload.finetune.files import index
from offload.finetune.packing import check_packable, pack
from offload.finetune.rows import Position, Rows

WORDS = ["The", "river", "bends", "where", "the", "old", "mill", "stands,", "and", "the", "mill", "turns."]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("data") / "x.jsonl"
    texts = [" ".join(WORDS[: 1 + k * 7 % 11]) for k in range(41)]
    file.write_text("".join(json.dumps({"prompt": t, "completion": f" {k}."}) + "\n" for k, t in enumerate(texts)))
    return str(file)


def make(path: str, **options: Any) -> Rows:
    encoder = Encoder(tokenizer(), max_length=24)
    return Rows(index(path), encoder, **({"max_length": 24, "seed": 3} | options))


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "WINDOW", 16)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_any_position_leads_to_the_same_rest(path: str, packing: bool, shuffle: bool) -> None:
    options = {"packing": packing, "shuffle": shuffle}
    everything = [list(make(path, **options).after(Position(epoch))) for epoch in range(2)]
    for epoch, found in enumerate(everything):
        assert found[-1][1] == Position(epoch + 1)
        for k, (_, behind) in enumerate(found[:-1]):
            assert list(make(path, **options).after(behind)) == found[k + 1 :]
    learnt = [sorted(pair for row, _ in found for pair in row) for found in everything]
    assert learnt[0] == learnt[1]  # every epoch has every sequence once
    assert len(learnt[0]) == 41
    assert (everything[0] == [(row, b) for row, b in everything[1]]) is False
    in_order = [row for row, _ in everything[0]] == [row for row, _ in everything[1]]
    assert in_order is not shuffle


def test_seeds_make_the_order(path: str) -> None:
    assert [r for r, _ in make(path, seed=3).after(Position())] == [r for r, _ in make(path).after(Position())]
    assert [r for r, _ in make(path, seed=4).after(Position())] != [r for r, _ in make(path).after(Position())]


@pytest.mark.parametrize("packing", [False, True])
def test_rows_are_counted_without_making_them(path: str, packing: bool) -> None:
    rows = make(path, packing=packing)
    counted = rows.count(3)
    assert counted == [len(list(rows.after(Position(epoch)))) for epoch in range(3)]
    assert rows.tokens == sum(len(ids) for row, _ in rows.after(Position()) for ids, _ in row)
    for batch, accumulation in ((1, 1), (2, 3), (100, 1)):
        found = list(steps(rows, Position(1), batch=batch, accumulation=accumulation, pad=0))
        assert len(found) == steps_of(counted[1], batch, accumulation)
        assert found[-1].behind == Position(2)
        assert sum(s.tokens for s in found) == rows.tokens


def test_steps_go_on_where_they_were(path: str) -> None:
    def batches(position: Position) -> list[tuple[Position, list[list[Any]]]]:
        found = steps(make(path, packing=True), position, batch=2, accumulation=3, pad=0)
        return [(s.behind, [[v.tolist() for v in m.values()] for m in s.micro_batches]) for s in found]

    everything = batches(Position())
    assert batches(everything[1][0]) == everything[2:]


@given(st.lists(st.integers(1, 30), max_size=60))
def test_packing_keeps_every_sequence_and_the_limit(lengths: list[int]) -> None:
    rows = pack(lengths, 30)
    assert sorted(k for row in rows for k in row) == list(range(len(lengths)))
    used = [sum(lengths[k] for k in row) for row in rows]
    assert all(0 < n <= 30 for n in used)
    assert sum(n <= 15 for n in used) <= 1  # two that are half empty would share a row
    assert len(rows) <= sum(lengths) / 15 + 1


ALONE_ONLY = {"bloom", "falcon", "opt"}  # their masks do not look at position_ids


@pytest.mark.parametrize("name", sorted(MODELS))
def test_packed_losses_equal_those_of_each_sequence_alone(name: str, tmp_path: Path) -> None:
    checkpoint = MODELS[name].save(tmp_path, torch.float64)
    eager = (
        {"experts_implementation": "eager"} if name in ("mixtral", "qwen3_moe") else {}
    )  # grouped products know no float64
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64, **eager)
    generator = torch.Generator().manual_seed(0)

    def pair(length: int) -> tuple[list[int], list[int]]:
        ids = torch.randint(3, 300, (length,), generator=generator).tolist()
        return ids, [IGNORED] * 2 + ids[2:]

    rows = [[pair(9), pair(17), pair(5)], [pair(25)], [pair(12), pair(3)]]

    def losses(batch: Any) -> torch.Tensor:
        labels = batch["labels"]
        logits = model(use_cache=False, **{k: v for k, v in batch.items() if k != "labels"}).logits
        return torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none"
        )[labels[:, 1:].flatten() != IGNORED]

    packed = losses(collate(rows, pad=0, packed=True))
    padded = losses(collate([[pair] for row in rows for pair in row], pad=0, packed=False))
    alone = torch.cat([losses(collate([[pair]], pad=0, packed=False)) for row in rows for pair in row])
    in_float32 = name in ("bloom", "gemma2", "gemma3")  # parts of these
    tolerance = {"rtol": 0, "atol": 1e-6 if in_float32 else 1e-12}
    torch.testing.assert_close(padded, alone, **tolerance)
    if name in ALONE_ONLY:
        assert not torch.allclose(packed, alone)
        with pytest.raises(ModelError, match=r"does not keep the sequences of a row apart.*data.packing=false"):
            check_packable(model.config)
    else:
        torch.testing.assert_close(packed, alone, **tolerance)
        check_packable(model.config)


def test_layers_with_a_state_are_not_packed() -> None:
    config = transformers.LlamaConfig(num_hidden_layers=2, layer_types=["full_attention", "linear_attention"])
    with pytest.raises(ModelError, match="layers of the kind linear_attention"):
        check_packable(config)
    mamba = transformers.MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=8)
    with pytest.raises(ModelError, match="packing: mamba"):
        check_packable(mamba)


def test_collate() -> None:
    rows = [[([5, 6, 7], [5, 6, 7]), ([8, 9], [IGNORED, 9])], [([5, 6], [5, 6])]]
    packed = collate(rows, pad=1, packed=True)
    assert {k: v.tolist() for k, v in packed.items()} == {
        "input_ids": [[5, 6, 7, 8, 9], [5, 6, 1, 1, 1]],
        "labels": [[IGNORED, 6, 7, IGNORED, 9], [IGNORED, 6, IGNORED, IGNORED, IGNORED]],
        "position_ids": [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]],
    }
    padded = collate([*rows[1:], [rows[0][0]]], pad=1, packed=False)
    assert {k: v.tolist() for k, v in padded.items()} == {
        "input_ids": [[5, 6, 1], [5, 6, 7]],
        "labels": [[IGNORED, 6, IGNORED], [IGNORED, 6, 7]],
    }


def test_what_the_template_refuses_is_named_or_left_out(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    file.write_text("".join(json.dumps({"messages": m}) + "\n" for m in (talk, talk[1:], talk)))
    tok = tokenizer()
    tok.chat_template = (
        "{% if messages[0].role != 'user' %}{{ raise_exception('no user') }}{% endif %}"
        "{% for m in messages %}{{ m.role + m.content }}{% endfor %}"
    )
    encoder = Encoder(tok, max_length=24)
    with pytest.raises(DataError, match=r"x.jsonl:2: the chat template refuses it: no user"):
        Rows(index(str(file)), encoder, max_length=24).count(1)
    rows = Rows(index(str(file)), encoder, max_length=24, skip_bad=True)
    assert rows.count(1) == [2]
    assert (rows.counts.bad, rows.counts.empty) == (1, 0)
