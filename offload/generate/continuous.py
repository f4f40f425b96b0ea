"""Many prompts through one model: in every pass each running sequence gets a token, and waiting prompts take the places
of those that ended.

This is continuous batching (Orca, Yu et al., OSDI 2022) for weights that stream: what a pass reads from disk serves all
of its tokens. Decoding alone leaves the cores idle while the disk reads, prompts alone leave the disk idle; together in
one pass they fill both, and sequences of different age need less memory than as many that grow together (MoE-Lens,
Yuan et al. 2025, arXiv 2504.09345).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from offload.generate.choosing import Chooser, Choosers
from offload.generate.prompts import Prompt
from offload.planner.batching import divides_again
from offload.runtime.pool import need_of
from offload.runtime.ragged import Ragged, Span


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A sequence that ended.

    Attributes:
        prompt: what it began with.
        tokens: new ones, the end token not among them.
        has_ended: by an end token.
    """

    prompt: Prompt
    tokens: list[int]
    has_ended: bool


@dataclass(frozen=True, kw_only=True)
class Passed:
    """One pass.

    Attributes:
        rows: tokens that ran through the model.
        prompts: that began in it.
        running: sequences that got a token.
        answers: of sequences that ended with it.
    """

    rows: int
    prompts: int
    running: int
    answers: list[Answer]


@dataclass(eq=False)
class _Running:
    prompt: Prompt
    span: Span
    tokens: list[int] = field(default_factory=list)

    def coming(self) -> Sequence[int]:
        """What it puts into the next pass."""
        return self.tokens[-1:] or self.prompt.ids


def passes(
    ragged: Ragged,
    choose: Chooser | Choosers,
    prompts: Sequence[Prompt],
    *,
    new_tokens: int,
    pass_tokens: int,
    sequences: int | None = None,
    divide: Callable[[int], None] | None = None,
) -> Iterator[Passed]:
    """Runs all prompts, those of the longest runs first: a place that one leaves is large enough for any that follows.

    Args:
        ragged: the model with its pool, in which the longest prompt with its new tokens must fit.
        new_tokens: for each prompt that does not say itself, at most.
        pass_tokens: in one pass, at most; but a pass without any takes one prompt, however long.
        sequences: that run at a time, at most.
        divide: called between passes, once no prompt waits, when the pool has shrunk to so many tokens: what it gave
            back can be used for weights. None: it never shrinks.
    """

    def need(prompt: Prompt) -> int:
        return need_of([len(prompt.ids)], prompt.new_tokens(new_tokens))[0]

    waiting = deque(sorted(prompts, key=lambda p: (-need(p), -len(p.ids), p.index)))
    running: list[_Running] = []
    while waiting or running:
        rows, began = len(running), 0
        while waiting and (sequences is None or len(running) < sequences):
            prompt = waiting[0]
            if rows and rows + len(prompt.ids) > pass_tokens:
                break
            start = ragged.pool.runs.take(need(prompt))
            if start is None:
                assert running, f"a sequence of {need(prompt)} tokens in a pool of {ragged.pool.runs.tokens}"
                break
            running.append(_Running(waiting.popleft(), Span(start)))
            rows, began = rows + len(prompt.ids), began + 1
        logits = ragged.forward([(one.span, one.coming()) for one in running])
        chosen = choose(logits, [(r.prompt.index, len(r.prompt.ids), [*r.prompt.ids, *r.tokens]) for r in running])
        count, ended = len(running), []
        for one, token in zip(running, chosen, strict=True):
            if token in choose.ends:
                ended.append((one, True))
                continue
            one.tokens.append(token)
            if len(one.tokens) == one.prompt.new_tokens(new_tokens):
                ended.append((one, False))
        for one, _ in ended:
            ragged.pool.runs.give(one.span.start)
            running.remove(one)
        answers = [Answer(prompt=one.prompt, tokens=one.tokens, has_ended=by) for one, by in ended]
        yield Passed(rows=rows, prompts=began, running=count, answers=answers)
        if divide is not None and running and not waiting:
            needs = [need(one.prompt) for one in running]
            left = max(one.prompt.new_tokens(new_tokens) - len(one.tokens) for one in running)
            if divides_again(ragged.pool.runs.tokens, sum(needs), left):
                starts = ragged.pool.shrink([(r.span.start, n) for r, n in zip(running, needs, strict=True)])
                for one, start in zip(running, starts, strict=True):
                    one.span.start = start
                divide(sum(needs))
