"""Answers a file of prompts in passes that all of them share: see `generate/continuous.py`."""

from __future__ import annotations

import time
from collections.abc import Collection
from contextlib import closing
from dataclasses import replace

import torch

from offload.commands.answering import Job, Meter
from offload.generate import Prompt
from offload.generate.choosing import Asked, Choosers
from offload.generate.continuous import Passed, passes
from offload.handle import Offloaded
from offload.plan import work_of
from offload.planner.batching import Batching
from offload.runtime.pool import KeyValuePool
from offload.runtime.ragged import Ragged
from offload.units import format_bytes, format_seconds

SAID_S = 10.0  # between two lines about how far it is
LEAST_ROOM = 0.01  # of what streams: less is not worth another division of memory


def by_passes(job: Job, plan: Batching, left_out: Collection[int] = ()) -> None:
    """All prompts but those left out."""
    left = [p for p in job.left() if p.index not in left_out]
    new_tokens = [p.new_tokens(job.options.max_new_tokens) for p in left]
    job.report.predicted_s = plan.seconds
    job.report.predicted_tokens_per_s = sum(new_tokens) / plan.seconds
    handle = job.load(work_of([len(p.ids) for p in left], new_tokens, plan), packs_later=plan.packs)
    with handle, closing(_pool(handle, plan.pool_tokens)) as pool:
        to_go = sum(len(p.ids) for p in left) + sum(new_tokens) - len(left)  # tokens through the model, at most
        _Sharing(job, plan, handle, to_go).run(left, pool)
        job.conclude(handle)


class _Sharing:
    """One model, one pool, and what is said of how far it is.

    Args:
        to_go: tokens that will run through the model, at most.
    """

    def __init__(self, job: Job, plan: Batching, handle: Offloaded, to_go: int) -> None:
        self._job, self._plan, self._handle, self._to_go = job, plan, handle, to_go
        self._meter = Meter(handle, job.report)
        self._said = time.perf_counter()

    def run(self, left: list[Prompt], pool: KeyValuePool) -> None:
        """Answers these."""
        job, plan, handle, options = self._job, self._plan, self._handle, self._job.options
        job.report.pool_bytes = plan.pool_tokens * handle.spec.kv_bytes_per_token
        job.say(
            f"{len(left):,} prompts, up to {plan.sequences} at a time, in passes of up to {plan.pass_tokens} tokens; "
            f"{self._weights()}, {format_bytes(job.report.pool_bytes)} for keys and values; predicted: "
            f"{format_seconds(plan.seconds)}, {job.report.predicted_tokens_per_s:.1f} new tokens/s"
        )
        choose = Choosers(
            handle.model,
            left,
            new_tokens=options.max_new_tokens,
            asked=Asked(sample=options.sample, seed=options.seed, **options.drawing()),
            stops_at_eos=not options.ignore_eos,
        )
        divides = handle.can_divide and handle.streamed_nbytes > 0 and pool.can_shrink
        with Ragged(handle.model, handle.session.kernels, pool) as ragged, job.console.status("first pass") as status:
            for done in passes(
                ragged,
                choose,
                left,
                new_tokens=options.max_new_tokens,
                pass_tokens=plan.pass_tokens,
                sequences=plan.sequences,
                divide=self._divide if divides else None,
            ):
                self._count(done)
                line = self._progress(done)
                status.update(line)
                if time.perf_counter() - self._said > SAID_S:
                    self._said = time.perf_counter()
                    job.say(line)

    def _divide(self, pool_tokens: int) -> None:
        """Gives weights the room that ended sequences leave, once it is worth it."""
        handle = self._handle
        room = (handle.work.pool_tokens - pool_tokens) * handle.spec.kv_bytes_per_token
        if room < LEAST_ROOM * handle.streamed_nbytes:  # it adds up until the pool shrinks again
            return
        self._meter.change()
        began = time.perf_counter()
        handle.divide_again(replace(handle.work, pool_tokens=pool_tokens))
        self._job.report.divisions += 1
        seconds = format_seconds(time.perf_counter() - began)
        self._job.say(f"no prompt waits any more: {self._weights()} ({seconds})")

    def _count(self, done: Passed) -> None:
        """Brings a pass into the report, and its answers into the file."""
        report, most = self._job.report, self._job.options.max_new_tokens
        report.passes, report.rows = report.passes + 1, report.rows + done.rows
        report.batch = max(report.batch, done.running)
        if done.answers:
            self._job.add([(a.prompt, a.tokens, a.has_ended) for a in done.answers])
        early = sum(a.prompt.new_tokens(most) - len(a.tokens) - 1 for a in done.answers if a.has_ended)
        self._to_go -= done.rows + early
        self._meter.read()

    def _progress(self, done: Passed) -> str:
        report, plan = self._job.report, self._plan
        at_this_pace = report.generate_s / report.rows * max(0, self._to_go)
        seconds = max(at_this_pace, plan.seconds - report.generate_s)  # the last passes hold few tokens
        return (
            f"pass {report.passes}: {len(self._job.answers.done):,} of {report.prompts:,} prompts answered, "
            f"{done.running} running, {done.rows} tokens; {report.rows / report.generate_s:.0f} tokens/s through the "
            f"model, at most about {format_seconds(seconds)} left"
        )

    def _weights(self) -> str:
        in_memory, on_disk = format_bytes(self._handle.resident_nbytes), format_bytes(self._handle.streamed_nbytes)
        return f"{in_memory} of weights in memory, {on_disk} on disk"


def _pool(handle: Offloaded, tokens: int) -> KeyValuePool:
    """Keys and values of all sequences, where the model computes."""
    spec = handle.spec
    return KeyValuePool(
        layers=spec.kv_layers,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        tokens=tokens,
        dtype=getattr(torch, spec.dtype),
        device=handle.session.device,
    )
