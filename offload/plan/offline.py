"""A pile of prompts, planned: how much memory for keys and values, how many tokens in a pass, and how long it takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from offload.budgets import divide
from offload.errors import BudgetError
from offload.plan.planning import Ask
from offload.planner.batching import Batching, best, between
from offload.planner.ops import Phase
from offload.planner.predict import Pricer
from offload.planner.schedule import Read, Upload
from offload.specs import Workload

ANCHORS = (8, 64, 128, 192, 256, 384, 512, 1024, 2048)  # tokens of a pass that are priced; between them, lines


def work_of(prompts: Sequence[int], new_tokens: int, batching: Batching) -> Workload:
    """What memory is set aside for."""
    return Workload(
        batch=batching.sequences,
        prompt_tokens=max(prompts),
        total_tokens=max(prompts) + new_tokens,
        pool_tokens=batching.pool_tokens,
        pass_tokens=max(batching.pass_tokens, batching.sequences, max(prompts)),
    )


def plan_offline(ask: Ask, prompts: Sequence[int], new_tokens: int, sequences: int | None = None) -> Batching:
    """The batching that answers all prompts soonest, by the model's and the machine's numbers.

    Args:
        ask: the model, the machine and the budgets; its `work` is not looked at.
        prompts: tokens of each.
        new_tokens: of each, at most.
        sequences: that run at a time, at most; None: as many as pay.

    Raises:
        BudgetError: not even one of them fits.
    """
    mean = max(1, sum(prompts) // len(prompts))
    refusal: BudgetError | None = None
    known: dict[tuple[int, ...], Callable[[int], float]] = {}  # by bytes that travel: neighbours often place alike

    def pass_s_of(pool_tokens: int, pass_tokens: int, most: int) -> Callable[[int], float] | None:
        nonlocal refusal
        guess = Batching(
            pool_tokens=pool_tokens, pass_tokens=pass_tokens, sequences=most, seconds=0, passes=0, tokens=0
        )
        work = work_of(prompts, new_tokens, guess)
        try:
            division = divide(
                ask.spec,
                ask.budgets,
                work,
                slots=ask.slots,
                extra_nbytes=ask.extra_nbytes,
                extra_device_nbytes=ask.extra_nbytes,
                base_nbytes=ask.base_nbytes,
            )
        except BudgetError as error:
            refusal = refusal or error
            return None
        pricer = Pricer(ask.spec, work, ask.computer)
        steps = pricer.schedule(division.placement)
        streamed = tuple(
            round(sum(s.nbytes for s in steps if isinstance(s, kind)) / (32 << 20)) for kind in (Read, Upload)
        )
        if streamed not in known:
            points = []
            for rows in ANCHORS:
                tokens = min(rows, mean) if rows > 64 else 1  # few rows are next tokens, many mostly prompts
                phase = Phase(sequences=rows // tokens, tokens=tokens, past=mean if tokens == 1 else 0)
                points.append((phase.rows, pricer.pass_cost(division.placement, phase).seconds))
            known[streamed] = between(sorted(dict(points).items()))
        return known[streamed]

    found = best(prompts, new_tokens, pass_s_of, sequences=sequences)
    if found is None:
        assert refusal is not None
        raise refusal
    return replace(found, sequences=min(found.sequences, len(prompts)))
