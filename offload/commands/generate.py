"""`offload generate`: a file of prompts in, a file of answers out; the same command goes on later."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

from offload.checkpoint import find, read_config
from offload.checkpoint.outline import sketch
from offload.commands.answering import Job, Report, by_blocks, by_passes
from offload.commands.options import Running
from offload.commands.plan import PlanRequest, ask_of
from offload.errors import UsageError
from offload.generate import Answers, Limits, Prompt, digest_of, even, identity_of, read_prompts, tokenizer_of
from offload.hardware import peak_rss_bytes
from offload.plan import Ask, best_batch, plan_offline
from offload.plan.planning import BATCHES
from offload.runtime.ragged import refuses
from offload.units import format_bytes, format_seconds

UNPACED = "1TB/s"  # of an emulated link without a pace: memory is slower, and a plan knows how slow


@dataclass(frozen=True, kw_only=True)
class Request(Running):
    """The options of `offload generate`; see its help."""

    prompts: str
    output: str
    batch: str = "auto"


def execute(request: Request) -> int:
    """Runs the request; returns the exit status. Errors are raised."""
    transformers.utils.logging.set_verbosity_error()
    console = Console(stderr=True, quiet=request.json)
    _check(request)
    directory, output = find(request.model), Path(request.output)
    tokenizer = tokenizer_of(directory)
    text = read_config(directory).get_text_config(decoder=True)
    limits = Limits(
        vocabulary=getattr(text, "vocab_size", None),
        max_tokens=getattr(text, "max_position_embeddings", None),
        new_tokens=request.max_new_tokens,
        raw=request.raw,
    )
    prompts = read_prompts(request.prompts, tokenizer, limits)
    before = identity_of(output)
    why = _why_blocks(request, directory, before)
    batch = None if why is None else _batch(request, prompts, before)
    with Answers(output, _identity(request, directory, prompts, batch), len(prompts)) as answers:
        report = Report(prompts=len(prompts), before=len(answers.done))
        job = Job(request, directory, tokenizer, prompts, answers, report, console)
        if report.before:
            console.print(f"{report.before:,} of {len(prompts):,} prompts have their answers in {output}", style="dim")
        if job.left() and batch is not None:
            console.print(f"note: in batches of {batch}, because {why}", style="yellow", highlight=False)
            by_blocks(job, batch)
        elif job.left():
            lengths = [len(p.ids) for p in job.left()]
            at_most = None if request.batch == "auto" else int(request.batch)
            by_passes(job, plan_offline(_ask(request, lengths), lengths, request.max_new_tokens, at_most))
        answers.sort()
    report.peak_rss_bytes = peak_rss_bytes()
    if request.json:
        print(json.dumps(vars(report) | {"tokens_per_s": report.tokens_per_s}))
    else:
        _summarise(report, output, console)
    return 0


def _check(request: Request) -> None:
    if request.batch != "auto" and (not request.batch.isdecimal() or int(request.batch) < 1):
        raise UsageError(f'--batch {request.batch}: a number of prompts from 1, or "auto"')
    request.check()
    if request.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens {request.max_new_tokens}: must be at least 1")
    output = Path(request.output)
    if not output.parent.is_dir():
        raise UsageError(f"-o {output}: there is no folder {output.parent}")
    if output.exists() and Path(request.prompts).exists() and output.samefile(request.prompts):
        raise UsageError(f"-o {output} is the file of prompts; name another")


def _why_blocks(request: Request, directory: Path, before: Mapping[str, Any] | None) -> str | None:
    """Why prompts go through the model's own generate in batches; None where all can share passes."""
    if before is not None and before.get("batch") is not None:
        return "the file of answers was begun so"
    if request.exact:
        return "exact results are those of the model's own generate"
    return refuses(sketch(directory, dtype=request.dtype).model)


def _device(request: Request) -> str:
    return (request.device or ("cuda" if torch.cuda.is_available() else "cpu")).partition(":")[0]


def _ask(request: Request, lengths: Sequence[int]) -> Ask:
    """The model, the machine and the budgets, for the planner."""
    kept = ("model", "cpu_memory", "gpu_memory", "resident", "device", "link", "dtype", "exact", "slots")
    options = {name: getattr(request, name) for name in kept}
    if request.link is None and _device(request) == "emulated":
        options["link"] = UNPACED
    return ask_of(PlanRequest(**options, prompt_tokens=max(lengths), new_tokens=request.max_new_tokens, batch="auto"))


def _batch(request: Request, prompts: list[Prompt], before: Mapping[str, Any] | None) -> int:
    """Prompts at a time: as asked, as the run that is gone on with had it, or as the planner finds best."""
    if request.batch != "auto":
        return min(int(request.batch), len(prompts))
    if before is not None and type(before.get("batch")) is int and before["batch"] > 0:
        return int(before["batch"])
    count = len(prompts)
    few = [b for b in BATCHES if b < count] + [count] * (count <= BATCHES[-1])
    return even(count, best_batch(_ask(request, [len(p.ids) for p in prompts]), few).work.batch)


def _identity(request: Request, directory: Path, prompts: list[Prompt], batch: int | None) -> dict[str, Any]:
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
            f"({report.tokens_per_s or 0:.2f} tokens/s), {report.read_bytes / 1e9:.2f} GB read"
        )
        if report.predicted_s:
            line += (
                f"; at most {format_seconds(report.predicted_s)} were predicted "
                f"({report.predicted_tokens_per_s:.2f} tokens/s)"
            )
    console.print(line + f"; peak memory {format_bytes(report.peak_rss_bytes)}", style="dim", highlight=False)
