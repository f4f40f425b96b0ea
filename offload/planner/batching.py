"""Continuous batching in numbers: how many passes a pile of prompts takes, and how many tokens are in each of them.

A pass over the weights takes what its bytes need or what its tokens need, whichever is more. More room for keys and
values means more sequences in a pass and fewer passes, but leaves less for weights, so that each pass reads more. How
many tokens of prompts join a pass is a choice too: too many at once, and the disk waits for prompts now and the cores
for decoding later. So both are tried, by playing the whole work through.

When no prompt waits any more, ever fewer sequences share a pass, and the disk is what it waits for. The room that those
leave that ended goes to weights then: memory is divided again whenever a fifth of the pool is free (`divides_again`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

PASS_TOKENS = (64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 1024, 1536, 2048)
SEQUENCES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 40, 48, 56, 64, 72, 80, 96, 112, 128, 160, 192, 256, 384, 512)
PLAYED = 2000  # prompts, at most, that stand for all
KEPT = 4 / 5  # of the pool: with no more in use, and no prompt waiting, memory is divided again
WORTH = 10  # passes at least for which that is worth its trouble
NEAR = 1.1  # of the best time: plans up to there are played again with such divisions

PassSeconds = Callable[[int, int], float]
"""What a pass of so many tokens takes, which are of so many sequences."""

Again = Callable[[int], tuple[PassSeconds, float] | None]
"""Of a division with so many tokens in the pool: what passes take then, and what dividing takes; None: no use."""


@dataclass(frozen=True, kw_only=True)
class Batching:
    """What was found for a pile of prompts.

    Attributes:
        pool_tokens: of all running sequences together, whose keys and values have a place.
        pass_tokens: in a pass, at most.
        sequences: that run at a time, at most.
        seconds: for all of it, if every sequence gets all of its new tokens.
        passes: over the weights.
        tokens: of prompts and new ones, that run through the model.
        packs: whether weights that stay are packed once memory is divided again.
    """

    pool_tokens: int
    pass_tokens: int
    sequences: int
    seconds: float
    passes: float
    tokens: int
    packs: bool = False


def divides_again(pool_tokens: int, used_tokens: int, passes_left: int) -> bool:
    """Whether memory is divided again, once no prompt waits.

    Args:
        pool_tokens: that the pool has.
        used_tokens: of them, in runs of sequences that have not ended.
        passes_left: until the last of these ends, at most.
    """
    return used_tokens <= KEPT * pool_tokens and passes_left >= WORTH


def play(
    prompts: Sequence[int],
    new_tokens: int | Sequence[int],
    *,
    pool_tokens: int,
    pass_tokens: int,
    sequences: int,
    pass_s: PassSeconds,
    again: Again | None = None,
) -> tuple[float, int, int]:
    """Seconds, passes, and sequences that ran at a time at most; as `generate/continuous.py` runs them.

    Args:
        prompts: tokens of each, those that need the longest runs first; the first one's fits in the pool.
        new_tokens: of each; one number where it is the same for all.
        sequences: that run at a time, at most.
        pass_s: what a pass of so many tokens of so many sequences takes.
        again: what it takes when memory was divided again.
    """
    left, running, most, free, seconds, number, at = len(prompts), 0, 0, pool_tokens, 0.0, 0, 0
    news = [new_tokens] * left if isinstance(new_tokens, int) else new_tokens
    ends: dict[int, tuple[int, int]] = {}  # number of a pass -> sequences and tokens of the pool that it frees
    while left or running:
        rows = running
        while left and running < sequences and free >= (need := prompts[at] + news[at] - 1):
            if rows and rows + prompts[at] > pass_tokens:
                break
            rows, running, free = rows + prompts[at], running + 1, free - need
            gone, given = ends.get(number + news[at] - 1, (0, 0))
            ends[number + news[at] - 1] = gone + 1, given + need
            at, left = at + 1, left - 1
        seconds += pass_s(rows, running)
        most = max(most, running)
        gone, given = ends.pop(number, (0, 0))
        running, free = running - gone, free + given
        if again and running and not left and divides_again(pool_tokens, pool_tokens - free, max(ends) - number):
            pool_tokens, free = pool_tokens - free, 0
            if (found := again(pool_tokens)) is not None:
                pass_s, seconds = found[0], seconds + found[1]
        number += 1
    return seconds, number, most


def best(
    prompts: Sequence[int],
    new_tokens: int | Sequence[int],
    pass_s_of: Callable[[int, int, int], PassSeconds | None],
    *,
    sequences: int | None = None,
    again_of: Callable[[int, int, int], Again] | None = None,
) -> Batching | None:
    """The room and the size of a pass that finish soonest; None where not even one sequence fits.

    Args:
        prompts: tokens of each.
        new_tokens: of each, at most; one number where it is the same for all.
        pass_s_of: (pool_tokens, pass_tokens, sequences) -> what passes take; None: no room.
        sequences: that run at a time, at most.
        again_of: of the same numbers -> what later divisions of memory bring; None: there are none.
    """
    news = [new_tokens] * len(prompts) if isinstance(new_tokens, int) else new_tokens
    whole = sorted(zip(prompts, news, strict=True), key=lambda pair: (-sum(pair), -pair[0]))
    step = -(-len(whole) // PLAYED)
    lengths, later = [tokens for tokens, _ in whole[::step]], [new for _, new in whole[::step]]
    needs = [tokens + new - 1 for tokens, new in whole[::step]]
    everything = sum(needs)
    plans: list[Batching] = []
    counts = sorted({min(n, len(lengths), sequences or len(lengths)) for n in SEQUENCES})
    for count in counts:
        pool = min(count * needs[0], everything)
        at_most = min(count if sequences else pool // needs[-1], len(lengths))
        fitting = False
        for most_rows in sorted({max(size, max(lengths)) for size in PASS_TOKENS}):
            pass_s = pass_s_of(pool, most_rows, at_most)
            if pass_s is None:
                continue
            fitting = True
            seconds, passes, running = play(
                lengths, later, pool_tokens=pool, pass_tokens=most_rows, sequences=at_most, pass_s=pass_s
            )
            plans.append(
                Batching(
                    pool_tokens=pool,
                    pass_tokens=most_rows,
                    sequences=running,
                    seconds=seconds * step,
                    passes=passes * step,
                    tokens=sum(tokens + new - 1 for tokens, new in whole),
                )
            )
        if not fitting:
            break
    if again_of is not None and plans:
        least = min(plan.seconds for plan in plans)
        plans = [
            _with_divisions(plan, lengths, later, pass_s_of, again_of) for plan in plans if plan.seconds <= NEAR * least
        ]
    found: Batching | None = None
    for plan in plans:
        if found is None or plan.seconds < found.seconds * 0.995:  # a tie goes to what takes less memory
            found = plan
    return found


def _with_divisions(
    plan: Batching,
    lengths: Sequence[int],
    new_tokens: Sequence[int],
    pass_s_of: Callable[[int, int, int], PassSeconds | None],
    again_of: Callable[[int, int, int], Again],
) -> Batching:
    """The same plan, played with memory that is divided again. Of prompts that stand for others, only the last end."""
    limits = plan.pool_tokens, plan.pass_tokens, plan.sequences
    pass_s = pass_s_of(*limits)
    assert pass_s is not None, "it fitted before"
    played = partial(
        play,
        lengths,
        new_tokens,
        pool_tokens=plan.pool_tokens,
        pass_tokens=plan.pass_tokens,
        sequences=plan.sequences,
        pass_s=pass_s,
    )
    alone, helped = played()[0], played(again=again_of(*limits))[0]
    return replace(plan, seconds=plan.seconds - (alone - helped))


def between(points: Sequence[tuple[int, float]]) -> Callable[[int], float]:
    """Straight lines between points, and on beyond the last two."""
    places = [x for x, _ in points]

    def value(x: int) -> float:
        at = min(max(1, bisect_left(places, x)), len(points) - 1)
        (x0, y0), (x1, y1) = points[at - 1], points[at]
        return y0 + (y1 - y0) * (x - x0) / (x1 - x0) if x > x0 else y0

    return value
