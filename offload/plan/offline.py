"""A pile of prompts, planned: how much memory for keys and values, how many tokens in a pass, and how long it takes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace

from offload.budgets import divide
from offload.errors import BudgetError
from offload.plan.planning import Ask
from offload.planner.batching import PASS_TOKENS, Again, Batching, PassSeconds, best, between
from offload.planner.ops import Phase
from offload.planner.placement import Tier
from offload.planner.predict import Pricer
from offload.planner.schedule import Read, Upload
from offload.profile import FORMAT_BITS
from offload.specs import Workload

ANCHORS = (8, 64, 128, 192, 256, 384, 512, 1024, 2048)  # tokens of a pass that are priced; between them, lines
AGAIN_S = 0.4  # that dividing memory again takes beside reading: hooks, trials of kernels, copies within the pool


def work_of(prompts: Sequence[int], new_tokens: int | Sequence[int], batching: Batching) -> Workload:
    """What memory is set aside for."""
    most = new_tokens if isinstance(new_tokens, int) else max(new_tokens)
    return Workload(
        batch=batching.sequences,
        prompt_tokens=max(prompts),
        total_tokens=max(prompts) + most,
        pool_tokens=batching.pool_tokens,
        pass_tokens=max(batching.pass_tokens, batching.sequences, max(prompts)),
    )


def plan_offline(
    ask: Ask, prompts: Sequence[int], new_tokens: int | Sequence[int], sequences: int | None = None
) -> Batching:
    """The batching that answers all prompts soonest, by the model's and the machine's numbers.

    Args:
        ask: the model, the machine and the budgets; its `work` is not looked at.
        prompts: tokens of each.
        new_tokens: of each, at most; one number where it is the same for all.
        sequences: that run at a time, at most; None: as many as pay.

    Raises:
        BudgetError: not even one of them fits.
    """
    prices = _Prices(ask, prompts, new_tokens)
    again_of = prices.again_of if ask.budgets.gpu_memory is None else None
    for most in (sequences, 1):  # memory for many short ones at a time may be more than there is beside a long one
        found = best(prompts, new_tokens, prices.pass_s_of, sequences=most, again_of=again_of)
        if found is not None:
            break
    else:
        assert prices.refusal is not None
        raise prices.refusal
    return replace(found, sequences=min(found.sequences, len(prompts)), packs=ask.packed is not None)


def room_for_one(ask: Ask, prompts: Sequence[int], new_tokens: Sequence[int]) -> int:
    """Of prompts in the order of the memory that they need: how many could run one at a time, from the first one on.

    Memory that is set aside for the longest of them holds each.

    Args:
        ask: the model, the machine and the budgets; its `work` is not looked at.
        prompts: tokens of each.
        new_tokens: of each, at most.
    """

    def is_too_long(number: int) -> bool:
        some, news = prompts[: number + 1], new_tokens[: number + 1]
        run = max(tokens + new - 1 for tokens, new in zip(some, news, strict=True))
        return _Prices(ask, some, news).pass_s_of(run, max(*some, PASS_TOKENS[0]), 1) is None

    return bisect_left(range(len(prompts)), True, key=is_too_long)


class _Prices:
    """What passes take under divisions of memory.

    Attributes:
        refusal: why the first division that did not fit was refused.
    """

    def __init__(self, ask: Ask, prompts: Sequence[int], new_tokens: int | Sequence[int]) -> None:
        self.refusal: BudgetError | None = None
        self._ask, self._prompts, self._new_tokens = ask, prompts, new_tokens
        self._mean = max(1, sum(prompts) // len(prompts))
        self._known: dict[tuple[int, ...], PassSeconds] = {}  # by bytes that travel: neighbours often place alike
        self._divided: dict[tuple[int, int, int, bool], tuple[PassSeconds, frozenset[str]] | None] = {}

    def pass_s_of(self, pool_tokens: int, pass_tokens: int, most: int) -> PassSeconds | None:
        """What a pass of so many tokens takes; None where there is no room for the pool."""
        found = self._division(pool_tokens, pass_tokens, most)
        return None if found is None else found[0]

    def again_of(self, pool_tokens: int, pass_tokens: int, most: int) -> Again:
        """The same where memory is divided again and again, and what that takes: weights are read that did not stay, or
        not packed."""
        lane = self._ask.profile.lane(self._ask.computer.read)
        spec, first = self._ask.spec, self._division(pool_tokens, pass_tokens, most)
        nbytes = {t.name: t.read_nbytes for t in (*spec.loose, *(t for u in spec.units for t in u.tensors))}
        packs = self._ask.packed is not None
        there: frozenset[str] = frozenset() if first is None or packs else first[1]

        def again(smaller: int) -> tuple[PassSeconds, float] | None:
            nonlocal there
            found = self._division(smaller, pass_tokens, most, packs=packs)
            if found is None:
                return None
            new, there = found[1] - there, found[1]
            return found[0], AGAIN_S + sum(nbytes[name] for name in new) / lane.bytes_per_s

        return again

    def _division(
        self, pool_tokens: int, pass_tokens: int, most: int, *, packs: bool = False
    ) -> tuple[PassSeconds, frozenset[str]] | None:
        key = pool_tokens, pass_tokens, most, packs
        if key not in self._divided:
            self._divided[key] = self._divide(*key)
        return self._divided[key]

    def _divide(
        self, pool_tokens: int, pass_tokens: int, most: int, packs: bool
    ) -> tuple[PassSeconds, frozenset[str]] | None:
        """What passes take, and which weights stay, packed or as they are stored."""
        ask = self._ask
        spec, extra = ask.packed if packs and ask.packed is not None else (ask.spec, ask.extra_nbytes)
        guess = Batching(
            pool_tokens=pool_tokens, pass_tokens=pass_tokens, sequences=most, seconds=0, passes=0, tokens=0
        )
        work = work_of(self._prompts, self._new_tokens, guess)
        try:
            division = divide(
                spec,
                ask.budgets,
                work,
                slots=ask.slots,
                extra_nbytes=extra,
                extra_device_nbytes=extra,
                base_nbytes=ask.base_nbytes,
            )
        except BudgetError as error:
            self.refusal = self.refusal or error
            return None
        pricer = Pricer(spec, work, ask.computer)
        steps = pricer.schedule(division.placement)
        travels = (
            packs,
            *(round(sum(s.nbytes for s in steps if isinstance(s, kind)) / (32 << 20)) for kind in (Read, Upload)),
        )
        if travels not in self._known:
            points = []
            for rows in ANCHORS:
                tokens = min(rows, self._mean) if rows > 64 else 1  # few rows are next tokens, many mostly prompts
                phase = Phase(sequences=rows // tokens, tokens=tokens, past=self._mean if tokens == 1 else 0)
                points.append((phase.rows, pricer.pass_cost(division.placement, phase).seconds))
            self._known[travels] = _narrowed(between(sorted(dict(points).items())), _last_layer_s(pricer))
        return self._known[travels], division.placement.names(Tier.HOST)


def _narrowed(whole: Callable[[int], float], row_s: float) -> PassSeconds:
    """Passes whose last layer computes for one token of each sequence (runtime/last_layer.py).

    Args:
        whole: what a pass of so many tokens would take otherwise.
        row_s: what each token less saves, as long as the cores are what a pass waits for.
    """
    least = min(whole(rows) for rows in ANCHORS)
    return lambda rows, sequences: max(least, whole(rows) - row_s * (rows - sequences))


def _last_layer_s(pricer: Pricer) -> float:
    """Seconds that one more token of many takes in the last layer, but for queries, keys and values."""
    spec = pricer.spec
    units = [unit for unit in spec.units if unit.layers]
    matrices = [t for t in units[-1].tensors if t.width and not t.is_table] if units else []
    elements = sum(t.elements for t in matrices)
    if not elements or units[-1].layers != 1:
        return 0.0
    few, many = ANCHORS[-3:-1]
    fewer, more = (
        sum(pricer.ops.matrix(t, t.format, spec.dtype, rows).seconds for t in matrices) for rows in (few, many)
    )
    asked = (spec.heads + 2 * spec.kv_heads) * spec.head_dim * spec.hidden_nbytes * 8 // int(FORMAT_BITS[spec.dtype])
    return max(0.0, more - fewer) / (many - few) * max(0.0, 1 - asked / elements)
