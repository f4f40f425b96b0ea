"""The command line. Thin: it reads options, calls the library and prints."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from offload.lean import leave_out
from offload.options import (
    CpuMemory,
    Device,
    Dtype,
    Exact,
    GpuMemory,
    IgnoreEos,
    Io,
    Json,
    Link,
    Model,
    Raw,
    Resident,
    Sample,
    Seed,
    Slots,
    Strict,
    Temperature,
    TopP,
    Weights,
)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Run and fine-tune models larger than memory.",
)


benches = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Measure how good offload is on this machine.")
app.add_typer(benches, name="bench")


def _version(asked: bool) -> None:
    if asked:
        from offload import __version__

        print(f"offload {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="print the version and stop", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """What goes before a command."""


@app.command()
def run(
    model: Model,
    prompt: Annotated[str | None, typer.Option(help="text; - reads standard input, @FILE reads a file")] = None,
    prompt_ids: Annotated[str | None, typer.Option(help="token ids such as 3,4,5 instead of a text")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="keep a conversation going")] = False,
    raw: Raw = False,
    max_new_tokens: Annotated[int, typer.Option(help="new tokens for each sequence")] = 128,
    batch: Annotated[int, typer.Option(help="run the prompt as this many sequences")] = 1,
    cpu_memory: CpuMemory = None,
    gpu_memory: GpuMemory = None,
    resident: Resident = None,
    device: Device = None,
    link: Link = None,
    dtype: Dtype = "auto",
    sample: Sample = False,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = 0,
    ignore_eos: IgnoreEos = False,
    slots: Slots = None,
    io: Io = "threads",
    weights: Weights = None,
    cpu_share: Annotated[
        str | None, typer.Option(help="of weights that travel to a GPU: what the CPU multiplies by: auto, or 0 to 1")
    ] = None,
    exact: Exact = False,
    strict: Strict = False,
    trace: Annotated[str | None, typer.Option(help="write a Chrome trace to this file")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="print the schedule of one pass and stop")] = False,
    plan: Annotated[str | None, typer.Option(help="a file that offload plan -o wrote")] = None,
    json: Json = False,
) -> None:
    """Generate text with a model larger than memory."""
    from offload.commands.early import check_run
    from offload.commands.run_options import RunRequest

    values = {k: v for k, v in locals().items() if k in RunRequest.__dataclass_fields__}
    request, directory = check_run(RunRequest(**values))
    from offload.commands.run import execute  # needs torch

    raise typer.Exit(execute(request, directory))


@app.command()
def generate(
    model: Model,
    prompts: Annotated[str, typer.Argument(help="JSON lines with prompt, messages or prompt_ids; or a text a line")],
    output: Annotated[str, typer.Option("-o", "--output", help="file of answers, a JSON line each; goes on with it")],
    raw: Raw = False,
    max_new_tokens: Annotated[int, typer.Option(help="new tokens for each prompt")] = 128,
    batch: Annotated[str, typer.Option(help="prompts at a time, or auto: as many as make the most tokens/s")] = "auto",
    cpu_memory: CpuMemory = None,
    gpu_memory: GpuMemory = None,
    resident: Resident = None,
    device: Device = None,
    link: Link = None,
    dtype: Dtype = "auto",
    sample: Sample = False,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = 0,
    ignore_eos: IgnoreEos = False,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="leave out lines that cannot be used or do not fit, and name them")
    ] = False,
    slots: Slots = None,
    io: Io = "threads",
    exact: Exact = False,
    strict: Strict = False,
    json: Json = False,
) -> None:
    """Answer a file of prompts, as many at a time as pay. The same command goes on after a kill."""
    from offload.commands.early import check_generate
    from offload.commands.generate_options import GenerateRequest

    values = {k: v for k, v in locals().items() if k in GenerateRequest.__dataclass_fields__}
    request, directory = check_generate(GenerateRequest(**values))
    from offload.commands.generate import execute  # needs torch

    raise typer.Exit(execute(request, directory))


@app.command()
def plan(
    model: Annotated[
        str, typer.Argument(help="folder with config.json, and headers or weights; hub id; or a fine-tuning YAML file")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="laid over a YAML file, such as train.learning_rate=2e-5")
    ] = None,
    cpu_memory: CpuMemory = None,
    gpu_memory: GpuMemory = None,
    resident: Resident = None,
    device: Device = None,
    link: Link = None,
    dtype: Dtype = "auto",
    prompt_tokens: Annotated[int, typer.Option(help="tokens of each prompt")] = 512,
    new_tokens: Annotated[int, typer.Option(help="new tokens for each sequence")] = 128,
    batch: Annotated[str, typer.Option(help="sequences at a time, or auto: as many as make the most tokens/s")] = "1",
    weights: Weights = None,
    exact: Exact = False,
    slots: Slots = None,
    hardware: Annotated[str | None, typer.Option(help="a profile's file, or a preset; default: this machine")] = None,
    what_if: Annotated[
        list[str] | None, typer.Option(help="cpu-memory=+32GiB, gpu-memory=16GiB, disk=2x, link=2x, cpu=2x or gpu=2x")
    ] = None,
    output: Annotated[str | None, typer.Option("-o", "--output", help="save the plan to this file")] = None,
    json: Json = False,
) -> None:
    """Predict how fast a model will run, and why. Says what holds it back and what would help, without running it."""
    from offload.commands.plan import execute
    from offload.commands.plan_options import PlanRequest

    values = {k: v for k, v in locals().items() if k in PlanRequest.__dataclass_fields__}
    lists = {"overrides": tuple(overrides or ()), "what_if": tuple(what_if or ())}
    raise typer.Exit(execute(PlanRequest(**values | lists)))


@app.command()
def pack(
    model: Model,
    out: Annotated[str, typer.Argument(help="folder to make")],
    weights: Annotated[str, typer.Option(help="lossless, int8, int4, int4-64 or int4-128")] = "lossless",
    io: Io = "threads",
    json: Json = False,
) -> None:
    """Write a checkpoint with its weights in fewer bits. It is used where it lies from then on."""
    from offload.commands.early import check_pack

    check_pack(model, out, weights, io)
    from offload.commands.pack import execute  # needs torch

    raise typer.Exit(execute(model, out, weights, io, as_json=json))


@app.command()
def finetune(
    config: Annotated[str, typer.Argument(help="a YAML file; see docs/finetuning.md")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="laid over the file, such as train.learning_rate=2e-5")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on after the last commit")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check everything, show what would be learnt, stop")
    ] = False,
    explain: Annotated[bool, typer.Option("--explain", help="print the schedule of one step and stop")] = False,
    json: Json = False,
) -> None:
    """Fine-tune a model whose training state is larger than memory."""
    from offload.commands.early import check

    early = check(config, overrides or (), quiet=json, writes=not (dry_run or explain), resume=resume)
    from offload.commands.finetune import Request, execute  # needs torch

    request = Request(
        config=config, overrides=overrides or (), resume=resume, dry_run=dry_run, explain=explain, json=json
    )
    raise typer.Exit(execute(request, early))


@app.command()
def probe(
    model: Annotated[
        str | None, typer.Argument(help="measure this model's shapes and files; default: common ones")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="measure anew, in under a minute")] = False,
    full: Annotated[bool, typer.Option("--full", help="measure anew, in five minutes, all weight formats too")] = False,
    offload_dir: Annotated[str | None, typer.Option(help="folder on the disk whose writing is measured")] = None,
    weights: Annotated[str | None, typer.Option(help="a weight format to measure as well, such as int4")] = None,
    out: Annotated[
        str | None, typer.Option("-o", "--output", help="write the profile (TOML) to this file, too")
    ] = None,
    forget: Annotated[bool, typer.Option("--forget", help="forget what runs have taught, and measure nothing")] = False,
    json: Json = False,
) -> None:
    """Measure this machine once: what plans rest on. Shows what was measured before unless told to measure anew."""
    from offload.commands.early import check_probe
    from offload.errors import UsageError

    if forget:
        from offload.commands.probe import forget_runs

        raise typer.Exit(forget_runs(model))
    if quick and full:
        raise UsageError("--quick and --full were both given; give one of them")
    check_probe(model, weights, offload_dir, out)
    from offload.commands.probe import execute  # needs torch

    effort = "quick" if quick else "full" if full else None
    raise typer.Exit(execute(model, effort, offload_dir, weights, out, as_json=json))


@benches.command("plan")
def bench_plan(
    out: Annotated[str, typer.Option("-o", "--output", help="writes OUTPUT.jsonl, .json and .md; goes on with them")],
    cells: Annotated[int | None, typer.Option(help="only so many of the grid's 64 configurations")] = None,
    folder: Annotated[
        str | None, typer.Option(help="for 2.6 GB of checkpoints, and profiles; default: in the temporary folder")
    ] = None,
    regret: Annotated[int, typer.Option(help="cells whose rejected plans are measured, too")] = 4,
    json: Json = False,
) -> None:
    """Predict a grid of runs, then measure them. Says how far predictions and chosen plans are from the truth."""
    from offload.commands.early import check_bench

    check_bench(out, cells, folder, regret)
    from offload.commands.bench import execute  # needs torch

    raise typer.Exit(execute(out, cells, folder, regret, as_json=json))


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="a file with what offload run --json printed")],
    trace: Annotated[str | None, typer.Option(help="the file that offload run --trace wrote in the same run")] = None,
    out: Annotated[str, typer.Option("-o", "--output", help="HTML file to write")] = "report.html",
) -> None:
    """Show a run as one page. It has lanes and waits, memory, link use, and what was predicted beside it."""
    from offload.commands.report import execute

    raise typer.Exit(execute(run, trace, out))


@app.command()
def doctor(
    offload_dir: Annotated[str | None, typer.Option(help="a folder to examine besides the current one")] = None,
    warm: Annotated[bool, typer.Option("--warm", help="compile all kernels now instead of at their first use")] = False,
) -> None:
    """Tell what this machine has and lacks."""
    from rich.console import Console

    from offload.doctor import examine, render

    if warm:
        from offload.commands.warm import execute

        execute(Console())

    findings = examine(offload_dir)
    render(findings, Console())
    raise typer.Exit(1 if any(f.status == "missing" and f.area == "python" for f in findings) else 0)


def main(arguments: list[str] | None = None) -> None:
    """The console script: errors of the library end with their message and status 1, Ctrl-C with 130."""
    from offload.errors import OffloadError, UsageError

    if arguments is None:  # the process is ours
        leave_out()
    try:
        status = app(args=arguments, standalone_mode=False)  # typer gives the status of an Exit back as a value
    except OffloadError as error:
        _say(f"offload: {error}")
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        _say("offload: interrupted")
        sys.exit(130)
    except typer.Abort:
        _say("offload: interrupted")
        sys.exit(130)
    except Exception as error:  # a wrong option, as click reports it; all else keeps its traceback
        _exit_for_click(error)
    else:
        if status == 130:
            _say("offload: interrupted")
        sys.exit(status if isinstance(status, int) else 0)


def _exit_for_click(error: Any) -> None:
    show = getattr(error, "show", None)
    if show is None:
        raise error
    show()
    sys.exit(getattr(error, "exit_code", 2))


def _say(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    main()
