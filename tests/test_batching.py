"""Continuous batching in numbers: what the planner plays is what runs, and it chooses the best of what it may take."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from offload.errors import BudgetError
from offload.generate import Prompt
from offload.generate.continuous import passes
from offload.plan.offline import _Prices, plan_offline, room_for_one
from offload.planner.batching import PASS_TOKENS, SEQUENCES, best, between, play
from offload.runtime.pool import Runs


class Pool:
    """Runs without memory."""

    def __init__(self, tokens: int) -> None:
        self.runs = Runs(tokens)

    def shrink(self, runs: Sequence[tuple[int, int]]) -> list[int | None]:
        self.runs = Runs(sum(tokens for _, tokens in runs))
        return [self.runs.take(tokens) for _, tokens in runs]


class Counting:
    """Counts what would run through a model."""

    def __init__(self, tokens: int) -> None:
        self.pool = Pool(tokens)

    def forward(self, work: Sequence[tuple[Any, Sequence[int]]]) -> torch.Tensor:
        return torch.zeros(len(work), 4)


class Never:
    """Chooses no end token."""

    ends = frozenset({9})

    def __call__(self, logits: torch.Tensor, sequences: Sequence[Any]) -> list[int]:
        return [1] * len(sequences)


@pytest.mark.parametrize("lengths", [[128] * 40, list(range(200, 20, -7)), [5], [300, 4, 4, 4]])
@pytest.mark.parametrize(("pool", "pass_tokens", "sequences"), [(2000, 160, 99), (700, 64, 3), (1200, 999, 8)])
@pytest.mark.parametrize("new_tokens", [1, 16])
@pytest.mark.parametrize("divides", [False, True])
def test_what_is_played_is_what_runs(
    lengths: list[int], pool: int, pass_tokens: int, sequences: int, new_tokens: int, divides: bool
) -> None:
    rows: list[int] = []
    played: list[int] = []
    divided: list[int] = []

    def pass_s(count: int, sequences: int) -> float:
        rows.append(count)
        return 2.0

    def again(tokens: int) -> Any:
        played.append(tokens)
        return pass_s, 1.0

    limits: dict[str, Any] = {"pass_tokens": pass_tokens, "sequences": sequences}
    helped = again if divides else None
    seconds, number, most = play(lengths, new_tokens, pool_tokens=pool, pass_s=pass_s, again=helped, **limits)
    prompts = [Prompt(index=i, line=i, ids=(1,) * n) for i, n in enumerate(lengths)]
    if divides:
        limits["divide"] = divided.append
    ran = list(passes(Counting(pool), Never(), prompts, new_tokens=new_tokens, **limits))  # type: ignore[arg-type]
    assert [p.rows for p in ran] == rows
    assert (len(ran), max(p.running for p in ran), seconds) == (number, most, 2.0 * number + len(played))
    assert divided == played
    assert not divides or new_tokens == 1 or divided or len(lengths) == 1 or pass_tokens == 999
    assert sum(rows) == sum(lengths) + len(lengths) * (new_tokens - 1)


def test_memory_is_divided_between_weights_and_keys_and_values() -> None:
    """1000 tokens of memory in all: what the pool leaves holds weights, and each token less means a longer pass."""

    def pass_s_of(pool: int, size: int, most: int) -> Any:
        left = 20_000 - pool
        return None if left < 0 else lambda rows, _: max(2.0 - left / 20_000, rows * 0.005)

    prompts = [128] * 64
    found = best(prompts, 64, pass_s_of)
    assert found is not None
    tried = []
    for count in SEQUENCES:
        for size in PASS_TOKENS:
            pool = min(count * 191, 64 * 191)
            pass_s = pass_s_of(pool, max(size, 128), count)
            if pass_s is not None:
                limits = {"pool_tokens": pool, "pass_tokens": max(size, 128), "sequences": 64}
                tried.append(play(prompts, 64, pass_s=pass_s, **limits)[0])
    assert min(tried) <= found.seconds <= min(tried) * 1.006
    assert found.seconds >= max(64 * 191 * 0.005, found.passes * 1.0)
    assert found.tokens == 64 * 191
    assert best([30_000], 64, pass_s_of) is None
    two = best(prompts, 64, pass_s_of, sequences=2)
    assert two is not None
    assert (two.sequences, two.pool_tokens) == (2, 382)


def test_many_prompts_are_stood_for_by_some() -> None:
    found = best([100] * 10_000, 2, lambda pool, size, most: lambda rows, _: 1.0)
    assert found is not None
    assert found.tokens == 10_000 * 101
    assert found.passes % 5 == 0


def test_a_long_prompt_leaves_room_for_fewer_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """What could run one at a time is planned, if only so; room for one prompt is room for those before it, too."""

    limit = 0

    def divided(self: _Prices, pool_tokens: int, pass_tokens: int, most: int, packs: bool) -> Any:
        if pool_tokens + pass_tokens + 100 * most <= limit:
            return (lambda rows, _: 1.0), 0
        self.refusal = BudgetError("too small")
        return None

    monkeypatch.setattr(_Prices, "_divide", divided)
    ask: Any = SimpleNamespace(budgets=SimpleNamespace(gpu_memory=1), packed=None)
    lengths, news = [2, 3, 300, 2, 350], [2, 2, 20, 400, 20]
    least = (3 + 64, 4 + 64, 319 + 300, 401 + 300, 401 + 350)  # run and pass, of each with those before it
    for fits in range(6):
        limit = 100 + least[fits - 1] if fits else 99 + least[0]
        assert room_for_one(ask, lengths, news) == fits
        if fits:
            assert plan_offline(ask, lengths[:fits], news[:fits]).sequences == 1
        if fits < 5:
            with pytest.raises(BudgetError, match="too small"):
                plan_offline(ask, lengths[: fits + 1], news[: fits + 1])


def test_between_points() -> None:
    value = between([(8, 1.0), (16, 1.0), (32, 3.0)])
    assert [value(n) for n in (1, 8, 12, 24, 32, 64)] == [1.0, 1.0, 1.0, 2.0, 3.0, 7.0]
