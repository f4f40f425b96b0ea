"""`offload generate`: a file of prompts in, a file of answers out; the same command goes on later."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

from offload.checkpoint import find, read_config
from offload.checkpoint.numbers import numbers
from offload.checkpoint.outline import sketch
from offload.commands.answering import Job, Report, by_blocks
from offload.commands.generate_options import GenerateRequest
from offload.commands.plan import ask_of
from offload.commands.plan_options import PlanRequest
from offload.commands.sharing import by_passes
from offload.commands.telling import note, say
from offload.errors import BudgetError, UsageError
from offload.generate import Answers, Limits, Prompt, digest_of, even, identity_of, read_prompts, tokenizer_of
from offload.generate.prompts import AS_ASKED, NAMED
from offload.hardware import peak_rss_bytes
from offload.io.rate import read_rate
from offload.kernels.chosen import Kernels
from offload.plan import Ask, best_batch, plan_offline, room_for_one, with_disk_rate
from offload.plan.planning import BATCHES
from offload.runtime.linears import WIDE, is_same_unpacked
from offload.runtime.ragged import refuses
from offload.specs import ModelSpec
from offload.units import MIB, format_bytes, format_moved, format_seconds

TELLS = 256 * MIB  # of a file: as much as tells how fast a disk reads
UNPACED = "1TB/s"  # of an emulated link without a pace: memory is slower, and a plan knows how slow


def execute(request: GenerateRequest, directory: Path) -> int:
    """Runs the request; returns the exit status. Errors are raised.

    Args:
        request, directory: as `early.check_generate` found them to be right.
    """
    transformers.utils.logging.set_verbosity_error()
    console = Console(stderr=True, quiet=request.json)
    output = Path(request.output)
    tokenizer = tokenizer_of(directory)
    text = read_config(directory).get_text_config(decoder=True)
    limits = Limits(
        vocabulary=getattr(text, "vocab_size", None),
        max_tokens=getattr(text, "max_position_embeddings", None),
        new_tokens=request.max_new_tokens,
        raw=request.raw,
    )
    bad: list[tuple[int, str]] = []
    prompts = read_prompts(request.prompts, tokenizer, limits, bad if request.keep_going else None)
    _name(bad, request, console)
    before = identity_of(output)
    why = _why_blocks(request, directory, before)
    if why is not None and (own := [p.line for p in prompts if p.settings != AS_ASKED]):
        raise UsageError(
            f"{request.prompts}:{own[0]} has settings of its own, but prompts go in batches that share theirs, "
            f"because {why}"
        )
    batch = None if why is None else _batch(request, prompts, before)
    with Answers(output, _identity(request, directory, prompts, batch), len(prompts)) as answers:
        report = Report(prompts=len(prompts), before=len(answers.done))
        job = Job(request, directory, tokenizer, prompts, answers, report, console)
        if report.before:
            say(console, f"{report.before:,} of {len(prompts):,} prompts have their answers in {output}")
        if job.left() and batch is not None:
            note(console, f"in batches of {batch}, because {why}")
            by_blocks(job, batch)
        elif job.left():
            bad += _share_passes(request, job)
        answers.sort()
    report.left_out = len(bad)
    report.peak_rss_bytes = peak_rss_bytes()
    if request.json:
        print(json.dumps(vars(report) | {"tokens_per_s": report.tokens_per_s}))
    else:
        _summarise(report, output, console)
    return 1 if bad else 0


def _share_passes(request: GenerateRequest, job: Job) -> list[tuple[int, str]]:
    """Answers what is left in passes; returns the lines that there is no memory for, with the reason.

    Raises:
        BudgetError: there are such lines, and they are not to be left out; or there is room for none.
    """
    left = sorted(job.left(), key=lambda p: (len(p.ids) + p.new_tokens(request.max_new_tokens), len(p.ids)))
    lengths, news = [len(p.ids) for p in left], [p.new_tokens(request.max_new_tokens) for p in left]
    at_most = None if request.batch == "auto" else int(request.batch)
    ask = _ask(request)
    too_long: list[tuple[int, str]] = []
    fits = len(left)
    try:
        plan = plan_offline(ask, lengths, news, at_most)
    except BudgetError as error:
        fits = room_for_one(ask, lengths, news)
        rest = sorted(left[fits:], key=lambda p: p.line)
        if not rest:  # each fits alone, but the process has grown since
            raise
        too_long = [(p.line, _no_room(p, request, left[fits - 1] if fits else None)) for p in rest]
        if not request.keep_going or not fits:
            raise BudgetError(
                f"{request.prompts}:{rest[0].line}: {too_long[0][1]}. It is so with {len(rest):,} of {len(left):,} "
                f"prompts: give more memory, shorten them{', or answer the others with --keep-going' * (fits > 0)}. "
                f"{error}"
            ) from None
        _name(too_long, request, job.console)
        plan = plan_offline(ask, lengths[:fits], news[:fits], at_most)
    by_passes(job, plan, {p.index for p in left[fits:]})
    return too_long


def _no_room(prompt: Prompt, request: GenerateRequest, longest: Prompt | None) -> str:
    """Why a prompt is left out.

    Args:
        longest: of those that fit, if any does.
    """
    tokens, new = len(prompt.ids), prompt.new_tokens(request.max_new_tokens)
    says = f"{tokens:,} tokens and {new:,} new ones do not fit in memory"
    if longest is None:
        return says
    most = len(longest.ids) + longest.new_tokens(request.max_new_tokens)
    return f"{says}; the longest that fits has {most:,} in all"


def _name(bad: Sequence[tuple[int, str]], request: GenerateRequest, console: Console) -> None:
    """Says which lines are left out, and why."""
    for line, why in bad[:NAMED]:
        say(console, f"left out: {request.prompts}:{line}: {why}", "yellow")
    if len(bad) > NAMED:
        say(console, f"left out: {len(bad) - NAMED:,} more lines", "yellow")


def _why_blocks(request: GenerateRequest, directory: Path, before: Mapping[str, Any] | None) -> str | None:
    """Why prompts go through the model's own generate in batches; None where all can share passes."""
    if before is not None and before.get("batch") is not None:
        return "the file of answers was begun so"
    if request.exact:
        return "exact results are those of the model's own generate"
    return refuses(sketch(directory, dtype=request.dtype).model)


def _device(request: GenerateRequest) -> str:
    return (request.device or ("cuda" if torch.cuda.is_available() else "cpu")).partition(":")[0]


def _ask(request: GenerateRequest, prompt_tokens: int = 1, new_tokens: int = 1) -> Ask:
    """The model, the machine and the budgets, for the planner; and one sequence, where it asks for that."""
    kept = ("model", "cpu_memory", "gpu_memory", "resident", "device", "link", "dtype", "exact", "slots")
    options = {name: getattr(request, name) for name in kept}
    if request.link is None and _device(request) == "emulated":
        options["link"] = UNPACED
    ask = ask_of(PlanRequest(**options, prompt_tokens=prompt_tokens, new_tokens=new_tokens, batch="auto"))
    directory = find(request.model)
    packed: tuple[ModelSpec, int] | None = None
    packs = ask.weights == "none" and not request.exact and ask.budgets.gpu_memory is None
    if packs and is_same_unpacked(Kernels("cpu", exact=False), (WIDE, WIDE)):
        known = numbers(directory, dtype=request.dtype, weights="lossless")
        packed = known.spec, known.unpack_nbytes
    return replace(ask, profile=with_disk_rate(ask.profile, _disk_rate(directory)), packed=packed)


def _disk_rate(directory: Path) -> float | None:
    """Bytes per second that the disk reads just now; None for a model too small to tell."""
    sizes = {path: path.stat().st_size for path in directory.glob("*.safetensors")}
    largest = max(sizes, key=sizes.__getitem__, default=None)
    return read_rate(largest, seconds=0.4) if largest is not None and sizes[largest] >= TELLS else None


def _batch(request: GenerateRequest, prompts: list[Prompt], before: Mapping[str, Any] | None) -> int:
    """Prompts at a time: as asked, as the run that is gone on with had it, or as the planner finds best."""
    if request.batch != "auto":
        return min(int(request.batch), len(prompts))
    if before is not None and type(before.get("batch")) is int and before["batch"] > 0:
        return int(before["batch"])
    count = len(prompts)
    few = [b for b in BATCHES if b < count] + [count] * (count <= BATCHES[-1])
    ask = _ask(request, max(len(p.ids) for p in prompts), request.max_new_tokens)
    return even(count, best_batch(ask, few).work.batch)


def _identity(request: GenerateRequest, directory: Path, prompts: list[Prompt], batch: int | None) -> dict[str, Any]:
    """All that the answers follow from. Budgets are not among it: where weights lie changes no result.

    Nor is what runs beside what, where prompts share passes (batch is None).
    """
    sampling = {k: getattr(request, k) for k in ("temperature", "top_p", "seed")} if request.sample else {}
    return {
        "version": 2,
        "model": str(directory.resolve()),
        "prompts": digest_of(prompts),
        "max_new_tokens": request.max_new_tokens,
        "batch": batch,
        "device": _device(request),
        "dtype": request.dtype,
        "exact": request.exact,
        "ignore_eos": request.ignore_eos,
        "sample": request.sample,
        **sampling,
    }


def _summarise(report: Report, output: Path, console: Console) -> None:
    line = f"{output}: {report.prompts:,} answers"
    if report.answered:
        line += (
            f", {report.answered:,} of them new: {report.new_tokens:,} tokens in {format_seconds(report.generate_s)} "
            f"({report.tokens_per_s or 0:.2f} tokens/s), {format_moved(report.read_bytes)} read"
        )
        if report.predicted_s:
            line += (
                f"; predicted, if no answer ends early: {format_seconds(report.predicted_s)} "
                f"({report.predicted_tokens_per_s:.2f} tokens/s)"
            )
    say(console, line + f"; peak memory {format_bytes(report.peak_rss_bytes)}")
