"""What can be wrong with a command before torch is loaded: its options, its files, its model's folder, its data."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from rich.console import Console

from offload.checkpoint import find
from offload.checkpoint.finding import check_config
from offload.checkpoint.target import check_target
from offload.commands.bar import bar
from offload.commands.generate_options import GenerateRequest
from offload.commands.options import check_backend, check_folder, check_place
from offload.commands.run_options import RunRequest
from offload.errors import UsageError
from offload.finetune.config import Config
from offload.finetune.files import DataFiles, index_data
from offload.finetune.journal import check_journal
from offload.finetune.reading import read_config
from offload.finetune.templates import read_template
from offload.io.checkpoint import read_checkpoint
from offload.kernels.formats.names import BITS, read_name
from offload.plan import load_plan
from offload.tiers.names import OWN, check_name, parse_link


@dataclass(frozen=True, kw_only=True)
class Early:
    """What was found to be right of a fine-tuning run.

    Attributes:
        config: the configuration.
        directory: the model's folder.
        data: the index of every file of data.
    """

    config: Config
    directory: Path
    data: DataFiles


def check(path: str, overrides: Sequence[str], *, quiet: bool, writes: bool = False, resume: bool = False) -> Early:
    """Reads the configuration, looks for the model, and reads every line of the data once.

    Args:
        writes: the run will write its folders.
        resume: what it goes on with may be in them.

    Raises:
        UsageError, DataError, CheckpointError: see offload.errors.
    """
    config = read_config(path, overrides)
    if config.budgets.device is not None:
        check_name(config.budgets.device)
    parse_link(config.budgets.link, config.budgets.device or OWN)
    if config.data.chat_template != "auto":
        read_template(config.data.chat_template)
    if writes:
        check_folder("train.output_dir", config.train.output_dir)
        check_journal(Path(config.train.output_dir), report_to=config.train.report_to, resume=resume)
        if config.budgets.offload_dir is not None:
            check_folder("budgets.offload_dir", config.budgets.offload_dir)
    directory = find_model(config.model)
    output = Path(config.train.output_dir)
    if writes and output.exists() and output.samefile(directory):
        raise UsageError(
            f"train.output_dir={output} is the folder of the model that is trained, and would be overwritten: "
            "name another"
        )
    if writes:
        read_checkpoint(directory)
    with bar(Console(stderr=True, quiet=quiet)) as progress:
        return Early(config=config, directory=directory, data=index_data(config.data, progress=progress))


def check_run(request: RunRequest) -> tuple[RunRequest, Path]:
    """The request with the options of its plan and the text of its prompt, and the model's folder.

    Raises:
        UsageError, CheckpointError: see offload.errors.
    """
    request = _planned(request)
    request.check()
    directory = find_model(request.model)
    request = replace(request, prompt=_text(request))
    read_checkpoint(directory)
    return request, directory


def check_generate(request: GenerateRequest) -> tuple[GenerateRequest, Path]:
    """The request, and the model's folder.

    Raises:
        UsageError, CheckpointError: see offload.errors.
    """
    request.check()
    directory = find_model(request.model)
    read_checkpoint(directory)
    return request, directory


def check_pack(model: str, out: str, weights: str, io: str) -> None:
    """The model's folder, what is to be made of it, and the place for it.

    Raises:
        UsageError, CheckpointError, StorageError: see offload.errors.
    """
    form = read_name(weights)
    check_backend(io)
    check_folder("OUT", out)
    params = read_checkpoint(directory := find_model(model)).params
    check_target(directory, Path(out), params * BITS[form[0]] // 8 if form is not None else 0)


def check_probe(model: str | None, weights: str | None, offload_dir: str | None, out: str | None) -> None:
    """What is measured: the model's files, a format, the disk of a folder; and the place for the profile.

    Raises:
        UsageError, CheckpointError: see offload.errors.
    """
    read_name(weights)
    if offload_dir is not None:
        check_folder("--offload-dir", offload_dir)
    if out is not None:
        check_place("-o", out)
    if model is not None:
        read_checkpoint(find_model(model))


def check_bench(output: str, cells: int | None, folder: str | None, regrets: int) -> None:
    """The places of what a benchmark writes, and its numbers.

    Raises:
        UsageError: one of them cannot be.
    """
    if cells is not None and cells < 4:
        raise UsageError(f"--cells {cells}: at least 4, of which some are held out")
    if regrets < 0:
        raise UsageError(f"--regret {regrets}: a number of cells from 0")
    for suffix in (".jsonl", ".json", ".md"):
        check_place("-o", beside(Path(output), suffix))
    if folder is not None:
        check_folder("--folder", folder)


def beside(stem: Path, suffix: str) -> Path:
    """The file that has a suffix more."""
    return stem.with_name(stem.name + suffix)


def find_model(model: str) -> Path:
    """The folder of a model that has a configuration.

    Raises:
        CheckpointError: there is none.
    """
    directory = find(model)
    check_config(directory)
    return directory


def _planned(request: RunRequest) -> RunRequest:
    """The request with the options of its plan, where it leaves them open."""
    if request.plan is None:
        return request
    options = load_plan(request.plan).options
    defaults = {f.name: f.default for f in fields(RunRequest)}
    return replace(
        request, **{k: v for k, v in options.items() if k in defaults and getattr(request, k) == defaults[k]}
    )


def _text(request: RunRequest) -> str | None:
    """The prompt as text: as given, from standard input, or from a file."""
    text = request.prompt
    if text == "-":
        return sys.stdin.read()
    if text is not None and text.startswith("@"):
        try:
            return Path(text[1:]).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--prompt {text}: the file cannot be read: {error}") from error
    return text
