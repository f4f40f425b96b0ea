"""`offload generate`: a file of prompts in, a file of answers out, batch by batch; the same command goes on later."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

from offload.api import Offloaded, load
from offload.checkpoint import find, read_config
from offload.commands.bar import bar
from offload.commands.plan import PlanRequest, ask_of
from offload.errors import UsageError
from offload.generate import (
    Answers,
    Block,
    Limits,
    Prompt,
    arrange,
    digest_of,
    ended,
    even,
    generate,
    identity_of,
    read_prompts,
    seed_of,
    tokenizer_of,
)
from offload.hardware import peak_rss_bytes
from offload.plan import best_batch
from offload.plan.planning import BATCHES
from offload.units import format_bytes, format_seconds


@dataclass(frozen=True, kw_only=True)
class Request:
    """The options of `offload generate`; see its help."""

    model: str
    prompts: str
    output: str
    raw: bool = False
    max_new_tokens: int = 128
    batch: str = "auto"
    cpu_memory: str | None = None
    gpu_memory: str | None = None
    resident: str | None = None
    device: str | None = None
    link: str | None = None
    dtype: str = "auto"
    sample: bool = False
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0
    ignore_eos: bool = False
    slots: int | None = None
    io: str = "threads"
    exact: bool = False
    strict: bool = False
    json: bool = False


@dataclass(kw_only=True)
class Report:
    """What this process did; --json prints it.

    Attributes:
        prompts, before: in the file; of these answered by earlier runs.
        batch, blocks: prompts at a time; batches that ran.
        answered, new_tokens: lines that were added, and their tokens. End tokens count, padding does not.
        prefill_s, decode_s: in the first step of each batch; in all later ones.
        read_bytes: from disk while generating.
    """

    prompts: int
    before: int
    batch: int
    blocks: int = 0
    answered: int = 0
    new_tokens: int = 0
    ready_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    read_bytes: int = 0
    peak_rss_bytes: int = 0

    @property
    def tokens_per_s(self) -> float | None:
        """New tokens a second, prefill included and loading not."""
        took = self.prefill_s + self.decode_s
        return self.new_tokens / took if took else None


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
    batch = _batch(request, prompts, before)
    with Answers(output, _identity(request, directory, prompts, batch), len(prompts)) as answers:
        report = Report(prompts=len(prompts), before=len(answers.done), batch=batch)
        left = [b for b in arrange(prompts, batch) if any(p.index not in answers.done for p in b.prompts)]
        if report.before:
            console.print(f"{report.before:,} of {len(prompts):,} prompts have their answers in {output}", style="dim")
        if left:
            _work(request, directory, tokenizer, left, answers, report, console)
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
    if request.slots is not None and request.slots < 1:
        raise UsageError(f"--slots {request.slots}: must be at least 1")
    if request.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens {request.max_new_tokens}: must be at least 1")
    if not request.sample and (request.temperature is not None or request.top_p is not None):
        raise UsageError("--temperature and --top-p need --sample")
    output = Path(request.output)
    if not output.parent.is_dir():
        raise UsageError(f"-o {output}: there is no folder {output.parent}")
    if output.exists() and Path(request.prompts).exists() and output.samefile(request.prompts):
        raise UsageError(f"-o {output} is the file of prompts; name another")


def _batch(request: Request, prompts: list[Prompt], before: Mapping[str, Any] | None) -> int:
    """Prompts at a time: as asked, as the run that is gone on with had it, or as the planner finds best."""
    if request.batch != "auto":
        return min(int(request.batch), len(prompts))
    if before is not None and type(before.get("batch")) is int and before["batch"] > 0:
        return int(before["batch"])
    ask = ask_of(
        PlanRequest(
            model=request.model,
            cpu_memory=request.cpu_memory,
            gpu_memory=request.gpu_memory,
            resident=request.resident,
            device=request.device,
            link=request.link,
            dtype=request.dtype,
            prompt_tokens=max(len(p.ids) for p in prompts),
            new_tokens=request.max_new_tokens,
            batch="auto",
            exact=request.exact,
            slots=request.slots,
        )
    )
    count = len(prompts)
    few = [b for b in BATCHES if b < count] + [count] * (count <= BATCHES[-1])
    return even(count, best_batch(ask, few).work.batch)


def _identity(request: Request, directory: Path, prompts: list[Prompt], batch: int) -> dict[str, Any]:
    """All that the answers follow from. Budgets are not among it: where weights lie changes no result."""
    device = request.device or ("cuda" if torch.cuda.is_available() else "cpu")
    sampling = {k: getattr(request, k) for k in ("temperature", "top_p", "seed")} if request.sample else {}
    return {
        "version": 1,
        "model": str(directory.resolve()),
        "prompts": digest_of(prompts),
        "max_new_tokens": request.max_new_tokens,
        "batch": batch,
        "device": device.partition(":")[0],
        "dtype": request.dtype,
        "exact": request.exact,
        "ignore_eos": request.ignore_eos,
        "sample": request.sample,
        **sampling,
    }


def _work(
    request: Request,
    directory: Path,
    tokenizer: Any,
    blocks: list[Block],
    answers: Answers,
    report: Report,
    console: Console,
) -> None:
    longest = max(len(p.ids) for b in blocks for p in b.prompts)
    with bar(console) as progress:
        handle = load(
            directory,
            cpu_memory=request.cpu_memory,
            gpu_memory=request.gpu_memory,
            resident=request.resident,
            device=request.device,
            link=request.link,
            dtype=request.dtype,
            batch=report.batch,
            context=longest + request.max_new_tokens,
            prompt_tokens=longest,
            slots=request.slots,
            io=request.io,
            cpu_share=0.0,  # a share follows from rates measured just now, and another processor rounds otherwise
            exact=request.exact,
            strict=request.strict,
            progress=progress,
        )
    with handle:
        report.ready_s = handle.ready_s
        console.print(
            f"{report.prompts - report.before:,} prompts, {report.batch} at a time: {len(blocks)} batches; "
            f"{format_bytes(handle.resident_nbytes)} of weights in memory, {format_bytes(handle.streamed_nbytes)} on "
            "disk",
            style="dim",
            highlight=False,
        )
        began = time.monotonic()
        for count, block in enumerate(blocks, 1):
            answers.add(_answer(request, handle, tokenizer, block, report, console, f"batch {count} of {len(blocks)}"))
            took = time.monotonic() - began
            console.print(
                f"batch {count} of {len(blocks)}: {len(answers.done):,} of {report.prompts:,} prompts answered, "
                f"{report.tokens_per_s or 0:.2f} tokens/s"
                + (f"; about {format_seconds(took / count * (len(blocks) - count))} left" * (count < len(blocks))),
                highlight=False,
            )
        report.answered = len(answers.done) - report.before
        for fallback in handle.fallbacks:
            console.print(f"note: {fallback}", style="yellow", highlight=False)


def _answer(
    request: Request,
    handle: Offloaded,
    tokenizer: Any,
    block: Block,
    report: Report,
    console: Console,
    what: str,
) -> list[dict[str, Any]]:
    """Generates one batch; its lines, as the file of answers has them."""
    if request.sample:
        torch.manual_seed(seed_of(request.seed, block.number))
    options = {k: v for k in ("temperature", "top_p") if (v := getattr(request, k)) is not None}
    greedy = {"temperature": None, "top_p": None, "top_k": None}
    before = handle.session.statistics().read_bytes
    with console.status(f"{what}: prefill") as status:
        result = generate(
            handle.model,
            handle.session,
            [p.ids for p in block.prompts],
            new_tokens=request.max_new_tokens,
            stop_at_eos=not request.ignore_eos,
            on_token=lambda n: status.update(f"{what}: token {n} of at most {request.max_new_tokens}"),
            do_sample=request.sample,
            **(options if request.sample else greedy),
        )
    report.blocks += 1
    report.prefill_s += result.prefill_s
    report.decode_s += sum(result.token_s)
    report.read_bytes += handle.session.statistics().read_bytes - before
    end = None if request.ignore_eos else handle.model.generation_config.eos_token_id
    ends = set() if end is None else {end} if isinstance(end, int) else set(end)
    lines = []
    for prompt, row in zip(block.prompts, result.tokens, strict=True):
        tokens, has_ended = ended(row, ends)
        report.new_tokens += len(tokens) + has_ended
        lines.append(
            {
                "index": prompt.index,
                "line": prompt.line,
                "text": tokenizer.decode(tokens, skip_special_tokens=True) if tokenizer else None,
                "tokens": tokens,
                "prompt_tokens": len(prompt.ids),
                "finish": "stop" if has_ended else "length",
            }
        )
    return lines


def _summarise(report: Report, output: Path, console: Console) -> None:
    line = f"{output}: {report.prompts:,} answers"
    if report.answered:
        line += (
            f", {report.answered:,} of them new: {report.new_tokens:,} tokens in "
            f"{format_seconds(report.prefill_s + report.decode_s)} ({report.tokens_per_s or 0:.2f} tokens/s, prefill "
            f"included), {report.read_bytes / 1e9:.2f} GB read"
        )
    console.print(line + f"; peak memory {format_bytes(report.peak_rss_bytes)}", style="dim", highlight=False)
