"""A file of prompts that is being answered: what all ways share, and the way by batches of the model's own generate."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from offload.api import load
from offload.commands.bar import bar
from offload.commands.options import Running
from offload.commands.telling import note, say
from offload.generate import Answers, Block, Prompt, arrange, ended, generate, seed_of
from offload.handle import Offloaded
from offload.runtime.session import SessionStatistics
from offload.specs import Workload
from offload.units import format_bytes, format_seconds


@dataclass(kw_only=True)
class Report:
    """What this process did; --json prints it.

    Attributes:
        prompts, before: in the file; of these answered by earlier runs.
        left_out: lines that could not be used, or that there was no memory for.
        batch: prompts that ran at a time, at most.
        passes: over the weights.
        divisions: of memory between weights and keys and values; more than one where room was left in the end.
        rows: tokens that ran through the model, prompts and new ones; 0 where batches were padded.
        answered, new_tokens: lines that were added, and their tokens. End tokens count, padding does not.
        ready_s, generate_s: until the model was loaded; from then to the last answer.
        predicted_s, predicted_tokens_per_s: what the planner expected of generate_s and of new tokens a second, if no
            sequence ended early; 0: nothing.
        read_bytes, uploaded_bytes: from disk, and to an accelerator, while generating.
        compute_s: of generate_s in the model's units, without waiting.
        fallbacks: what did not go the fast way, a sentence each.
        resident_bytes, pool_bytes: of weights, and of keys and values in the shared pool, by the first division.
    """

    prompts: int
    before: int
    left_out: int = 0
    batch: int = 0
    passes: int = 0
    divisions: int = 1
    rows: int = 0
    answered: int = 0
    new_tokens: int = 0
    ready_s: float = 0.0
    generate_s: float = 0.0
    predicted_s: float = 0.0
    predicted_tokens_per_s: float = 0.0
    read_bytes: int = 0
    uploaded_bytes: int = 0
    compute_s: float = 0.0
    resident_bytes: int = 0
    pool_bytes: int = 0
    peak_rss_bytes: int = 0
    fallbacks: list[str] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float | None:
        """New tokens a second, prompts included and loading not."""
        return self.new_tokens / self.generate_s if self.generate_s else None


@dataclass(frozen=True)
class Job:
    """A file of prompts, its answers, and how to get them."""

    options: Running
    directory: Path
    tokenizer: Any
    prompts: list[Prompt]
    answers: Answers
    report: Report
    console: Console

    def left(self) -> list[Prompt]:
        """Prompts without an answer."""
        return [p for p in self.prompts if p.index not in self.answers.done]

    def add(self, found: Sequence[tuple[Prompt, list[int], bool]]) -> None:
        """Makes answers durable: prompt, tokens without the end token, and whether there was one."""
        lines = []
        for prompt, tokens, has_ended in found:
            if prompt.index not in self.answers.done:
                self.report.new_tokens += len(tokens) + has_ended
                self.report.answered += 1
            text = self.tokenizer.decode(tokens, skip_special_tokens=True) if self.tokenizer else None
            lines.append(
                {
                    "index": prompt.index,
                    "line": prompt.line,
                    "text": text,
                    "tokens": tokens,
                    "prompt_tokens": len(prompt.ids),
                    "finish": "stop" if has_ended else "length",
                }
            )
        self.answers.add(lines)

    def load(self, work: Workload, *, packs_later: bool = False) -> Offloaded:
        """The model, with memory set aside for `work`; what stays may be packed when memory is divided again."""
        with bar(self.console) as progress:
            handle = load(
                self.directory,
                **self.options.placing(),
                work=work,
                packs_later=packs_later,
                cpu_share=0.0,  # a share follows from rates measured just now, and another processor rounds otherwise
                progress=progress,
            )
        self.report.ready_s, self.report.resident_bytes = handle.ready_s, handle.resident_nbytes
        return handle

    def say(self, text: str) -> None:
        say(self.console, text)

    def conclude(self, handle: Offloaded) -> None:
        """Says what did not go the fast way, and keeps it in the report."""
        self.report.fallbacks += handle.fallbacks
        for fallback in handle.fallbacks:
            note(self.console, fallback)


class Meter:
    """Brings the counters of a handle's sessions, one after the other, into a report.

    Args:
        handle: about to generate; its counters so far do not count.
        report: what is kept up to date.
    """

    def __init__(self, handle: Offloaded, report: Report) -> None:
        self._handle, self._report = handle, report
        self._began = time.perf_counter()
        self._before: SessionStatistics | None = handle.session.statistics()
        self._past = 0, 0, 0.0

    def read(self) -> None:
        """Takes them as they are now."""
        self._report.generate_s = time.perf_counter() - self._began
        self._report.read_bytes, self._report.uploaded_bytes, self._report.compute_s = self._sums()

    def change(self) -> None:
        """The session is about to be replaced by another, all of whose counters will count."""
        self._past, self._before = self._sums(), None

    def _sums(self) -> tuple[int, int, float]:
        now, before = self._handle.session.statistics(), self._before
        sums = tuple(mine + theirs for mine, theirs in zip(self._past, _counts(now), strict=True))
        earlier = _counts(before) if before is not None else (0, 0, 0.0)
        read, uploaded, computing = (mine - theirs for mine, theirs in zip(sums, earlier, strict=True))
        return int(read), int(uploaded), computing


def _counts(statistics: SessionStatistics) -> tuple[int, int, float]:
    """Bytes read and uploaded, and seconds in units."""
    return statistics.read_bytes, statistics.uploaded_bytes, statistics.totals.busy_s.get("compute", 0.0)


def by_blocks(job: Job, batch: int) -> None:
    """Batches of the model's own generate, the longest prompts first: see `generate/many.py`."""
    options, report = job.options, job.report
    blocks = [b for b in arrange(job.prompts, batch) if any(p.index not in job.answers.done for p in b.prompts)]
    longest = max(len(p.ids) for b in blocks for p in b.prompts)
    handle = job.load(Workload(batch=batch, prompt_tokens=longest, total_tokens=longest + options.max_new_tokens))
    report.batch = batch
    with handle:
        job.say(
            f"{len(job.left()):,} prompts, {batch} at a time: {len(blocks)} batches; "
            f"{format_bytes(handle.resident_nbytes)} of weights in memory, {format_bytes(handle.streamed_nbytes)} on "
            "disk"
        )
        meter = Meter(handle, report)
        for count, block in enumerate(blocks, 1):
            what = f"batch {count} of {len(blocks)}"
            job.add(_answer(job, handle, block, what))
            meter.read()
            left = report.generate_s / count * (len(blocks) - count)
            job.say(
                f"{what}: {len(job.answers.done):,} of {report.prompts:,} prompts answered, "
                f"{report.tokens_per_s or 0:.2f} tokens/s" + f"; about {format_seconds(left)} left" * (left > 0)
            )
        report.passes = handle.session.statistics().passes
        job.conclude(handle)


def _answer(job: Job, handle: Offloaded, block: Block, what: str) -> list[tuple[Prompt, list[int], bool]]:
    """Generates one batch."""
    options = job.options
    if options.sample:
        torch.manual_seed(seed_of(options.seed, block.number))
    with job.console.status(f"{what}: prefill") as status:
        result = generate(
            handle.model,
            handle.session,
            [p.ids for p in block.prompts],
            new_tokens=options.max_new_tokens,
            stop_at_eos=not options.ignore_eos,
            on_token=lambda n: status.update(f"{what}: token {n} of at most {options.max_new_tokens}"),
            **options.choosing(),
        )
    end = None if options.ignore_eos else handle.model.generation_config.eos_token_id
    ends = set() if end is None else {end} if isinstance(end, int) else set(end)
    return [(prompt, *ended(row, ends)) for prompt, row in zip(block.prompts, result.tokens, strict=True)]
