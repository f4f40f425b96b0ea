"""`offload finetune`: a configuration in, a trained model out, and what it took."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import transformers
from rich.console import Console

from offload import api
from offload.checkpoint import read_config
from offload.commands.bar import bar
from offload.commands.early import Early, check
from offload.commands.outlook import outlook_of, tokens_of
from offload.commands.telling import note, say
from offload.commands.training import Progress, announce, place, summarise
from offload.errors import UsageError
from offload.finetune import finish
from offload.finetune.choice import announced
from offload.finetune.config import Config
from offload.finetune.disk import Finished, check_room, finish_state, forget_finished, read_finished
from offload.finetune.journal import Journal, read_journal
from offload.finetune.loop import Run, Stop, finishing_steps, run
from offload.finetune.outlook import Outlook
from offload.finetune.prepare import Prepared, excerpt, prepare
from offload.finetune.protocol import Trainer
from offload.generate import tokenizer_of
from offload.hardware import versions
from offload.optim import options_of
from offload.planner.schedule import explain
from offload.units import parse_bytes

STATE = "state"  # folder in output_dir, where budgets.offload_dir names none


@dataclass(frozen=True, kw_only=True)
class Request:
    """The options of `offload finetune`; see its help."""

    config: str
    overrides: Sequence[str] = ()
    resume: bool = False
    dry_run: bool = False
    explain: bool = False
    json: bool = False


def execute(request: Request, early: Early | None = None) -> int:
    """Trains; returns the exit status. Errors are raised.

    Args:
        early: what was checked before this module was imported; None: it is checked now.
    """
    transformers.utils.logging.set_verbosity_error()
    console = Console(stderr=True, quiet=request.json)
    is_rehearsal = request.dry_run or request.explain
    early = early or check(
        request.config, request.overrides, quiet=request.json, writes=not is_rehearsal, resume=request.resume
    )
    config, directory = early.config, early.directory
    output, limit = Path(config.train.output_dir), config.budgets.disk_limit
    tokenizer, prepared, total = read_data(early, console, counts=not request.resume)
    outlook = outlook_of(config, directory, total)
    announce(config, prepared, total, outlook, console)
    state = Path(config.budgets.offload_dir or output / STATE)
    finished = read_finished(state) if request.resume else None
    if finished is not None:
        return _already_finished(request, config, prepared, finished, state, console)
    check_room(outlook, state, output, parse_bytes(limit, "disk_limit") if limit else None, resume=request.resume)
    if is_rehearsal:
        return _rehearse(request, config, prepared, outlook, tokenizer, console)
    forget_finished(state)
    with finishing_steps() as stop, _open(request, config, directory, outlook) as trainer:
        if not total:
            total = _total(trainer, config, prepared)
        where = trainer.whereabouts()
        if where is not None:
            say(console, place(where))
        report = _train(request, config, prepared, total, trainer, stop, console, tokenizer, directory, outlook)
        report["plan"] = outlook.as_dict() | (asdict(where) if where is not None else {})
    if report["is_complete"] and not config.budgets.keep_state:
        finish_state(state, Finished(step=report["steps"], model=config.train.output_dir))
    if request.json:
        print(json.dumps(report))
    else:
        summarise(report, output, console)
    return 128 + stop.signal if stop.signal else 0


def engine_arguments(config: Config, *, resume: bool) -> dict[str, Any]:
    """What `offload.finetuning` is given besides the model."""
    train, budgets = config.train, config.budgets
    arguments: dict[str, Any] = {
        "method": config.method,
        "optimizer": train.optim,
        "learning_rate": train.learning_rate,
        "max_grad_norm": train.max_grad_norm or None,
        "weight_decay": train.weight_decay,
        "offload_dir": budgets.offload_dir or str(Path(train.output_dir) / STATE),
        "seed": train.seed,
        "resume": resume,
    }
    if "betas" in options_of(train.optim):
        arguments |= {"betas": (train.adam_beta1, train.adam_beta2), "eps": train.adam_epsilon}
    if budgets.activations != "auto":
        arguments["activations"] = budgets.activations
    if budgets.update_share != "auto":
        arguments["update_share"] = budgets.update_share
    if train.optim_args:
        arguments["optimizer_args"] = train.optim_args
    if config.method == "lora":
        arguments["micro_batches"] = train.gradient_accumulation_steps
        arguments["lora"] = {name: getattr(config.lora, name) for name in config.lora.__struct_fields__}
    if config.method == "zo":
        zo = config.zo
        arguments |= {"zo_eps": zo.eps, "zo_write_every": zo.write_every, "zo_sparsity": zo.sparsity}
    arguments["tokens"] = tokens_of(config)
    optional = ("cpu_memory", "gpu_memory", "disk_limit", "device", "link")
    arguments |= {name: value for name in optional if (value := getattr(budgets, name)) is not None}
    known = inspect.signature(api.finetuning).parameters
    if missing := [name for name in arguments if name not in known]:  # what is left over would go to transformers
        raise UsageError(f"budgets.{missing[0]} was given, but training does not know it yet; leave it out")
    return arguments


def _already_finished(
    request: Request, config: Config, prepared: Prepared, finished: Finished, state: Path, console: Console
) -> int:
    """Says so; or that a longer run cannot go on from it."""
    total = prepared.feed.count(config.train)
    if total > finished.step:
        raise UsageError(
            f"the run was finished at step {finished.step}, and its optimizer state removed from {state}, so it cannot "
            f"go on to step {total}. Train the model in {finished.model} in another train.output_dir; "
            "budgets.keep_state=true keeps the state next time"
        )
    finish_state(state, finished)  # in case that removing was cut off
    if request.json:
        print(json.dumps({"is_complete": True, "steps": finished.step, "total_steps": total}))
    say(console, f"the run is finished: {finished.step} steps; the model is in {finished.model}")
    return 0


def read_data(early: Early, console: Console, *, counts: bool = True) -> tuple[Any, Prepared, int]:
    """The model's tokenizer, what is learnt, and in how many steps: 0 where they are not counted.

    Raises:
        UsageError, DataError: see offload.errors.
    """
    config = early.config
    tokenizer = tokenizer_of(early.directory)
    if tokenizer is None:
        raise UsageError(f"{config.model} has no tokenizer; put tokenizer.json and tokenizer_config.json beside it")
    with bar(console) as progress:
        prepared = prepare(config, tokenizer, read_config(early.directory), early.data)
        return tokenizer, prepared, prepared.feed.count(config.train, _records(progress)) if counts else 0


def _records(progress: Any) -> Any:
    """The bar's callback for work that is counted in records, not bytes."""
    return lambda what, done, total: progress(f"{what}: {done:,} of {total:,} records", 0, 0)


def _open(request: Request, config: Config, directory: Path, outlook: Outlook) -> AbstractContextManager[Trainer]:
    with announced(outlook.forecast.choice if outlook.forecast is not None else None):
        return api.finetuning(directory, **engine_arguments(config, resume=request.resume))


def _total(trainer: Trainer, config: Config, prepared: Prepared) -> int:
    """Steps of a resumed run: as it was counted when it began, unless max_steps says otherwise."""
    if config.train.max_steps < 0 and "total_steps" in trainer.extra:
        return int(trainer.extra["total_steps"])
    return prepared.feed.count(config.train)


def _train(
    request: Request,
    config: Config,
    prepared: Prepared,
    total: int,
    trainer: Trainer,
    stop: Stop,
    console: Console,
    tokenizer: Any,
    directory: Path,
    outlook: Outlook,
) -> dict[str, Any]:
    train, output = config.train, Path(config.train.output_dir)
    parts = {"tokenizer": tokenizer, "source": directory}
    keep = trainer.step_number if request.resume else None
    with Journal(output, report_to=train.report_to, keep=keep) as journal, Progress(console, total) as shown:
        if journal.note:
            note(console, journal.note)
        journal.on_note = lambda text: note(console, text)
        if trainer.step_number:
            say(console, f"going on after step {trainer.step_number} of {total}")
        elif request.resume:
            note(console, "--resume: nothing was committed yet, so the run begins at its first step")

        def on_line(line: Mapping[str, Any]) -> None:
            if outlook.forecast is not None and "loss" in line:
                line = {**line, "predicted_step_s": outlook.forecast.cost.seconds}
            journal.write(line)
            shown.show(line)

        def on_export(step: int) -> None:
            finish.export(trainer, output, step, keep=train.save_total_limit, **parts)

        what = Run(
            train=train,
            feed=prepared.feed,
            total_steps=total,
            eval_feed=prepared.eval_feed,
            identity=prepared.identity,
            on_line=on_line,
            on_export=on_export,
        )
        is_complete = run(trainer, what, stop)
        if is_complete:
            shown.now("saving the model")
            finish.save(trainer, output, **parts)
    return _report(config, prepared, total, trainer, is_complete, journal.path)


def _rehearse(
    request: Request, config: Config, prepared: Prepared, outlook: Outlook, tokenizer: Any, console: Console
) -> int:
    """Shows what would be learnt, or the steps of a step, and trains nothing."""
    if request.explain:
        if outlook.forecast is None:
            raise UsageError(
                "--explain: there is no schedule to show: the memory is too small, or nobody has measured the "
                "accelerator yet (offload probe does)"
            )
        print(explain(outlook.forecast.schedule))
        return 0
    text = excerpt(prepared.feed, tokenizer)
    if request.json:
        facts = {"model": config.model, "total_steps": outlook.steps, "plan": outlook.as_dict()}
        print(json.dumps(facts | {"data": data_of(prepared), "excerpt": text}))
    else:
        say(console, "the first row; what is learnt stands between ⟦ and ⟧:")
        print(text)
    return 0


def data_of(prepared: Prepared) -> dict[str, Any]:
    """What is learnt from, for --json."""
    rows = prepared.feed.rows
    return {
        "records": len(prepared.records),
        "bad_lines": prepared.records.bad_count,
        "refused_by_template": rows.counts.bad,
        "empty": rows.counts.empty,
        "cut_tokens": rows.counts.cut_tokens,
        "chat_template": prepared.template,
    }


def _report(
    config: Config, prepared: Prepared, total: int, trainer: Trainer, is_complete: bool, journal: Path
) -> dict[str, Any]:
    lines = read_journal(journal)
    steps, evals = [x for x in lines if "loss" in x], [x for x in lines if "eval_loss" in x]
    return {
        "model": config.model,
        "method": config.method,
        "output_dir": config.train.output_dir,
        "is_complete": is_complete,
        "steps": trainer.step_number,
        "total_steps": total,
        "loss_first": steps[0]["loss"] if steps else None,
        "loss_last": steps[-1]["loss"] if steps else None,
        "eval_loss_first": evals[0]["eval_loss"] if evals else None,
        "eval_loss_last": evals[-1]["eval_loss"] if evals else None,
        "tokens": sum(x["tokens"] for x in steps),
        "tokens_per_s": median(x["tokens_per_s"] for x in steps) if steps else None,
        "step_s": median(x["step_s"] for x in steps) if steps else None,
        "read_bytes": sum(x["read_bytes"] for x in steps),
        "write_bytes": sum(x["write_bytes"] for x in steps),
        "peak_rss_bytes": trainer.peak_nbytes,
        "fallbacks": list(trainer.fallbacks),
        "data": data_of(prepared),
        "versions": versions(),
    }
