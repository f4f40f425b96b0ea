"""What can be wrong with a command before torch is loaded: its options, its files, its model's folder, its data."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from rich.console import Console

from offload.checkpoint import find
from offload.checkpoint.finding import check_config
from offload.commands.bar import bar
from offload.commands.generate_options import GenerateRequest
from offload.commands.options import check_backend, check_folder
from offload.commands.run_options import RunRequest
from offload.errors import UsageError
from offload.finetune.config import Config
from offload.finetune.files import DataFiles, index_data
from offload.finetune.reading import read_config
from offload.io.checkpoint import read_checkpoint
from offload.kernels.formats.names import read_name
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


def check(path: str, overrides: Sequence[str], *, quiet: bool, writes: bool = False) -> Early:
    """Reads the configuration, looks for the model, and reads every line of the data once.

    Args:
        writes: the run will write its folders.

    Raises:
        UsageError, DataError, CheckpointError: see offload.errors.
    """
    config = read_config(path, overrides)
    if config.budgets.device is not None:
        check_name(config.budgets.device)
    parse_link(config.budgets.link, config.budgets.device or OWN)
    if writes:
        check_folder("train.output_dir", config.train.output_dir)
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
        UsageError, CheckpointError: see offload.errors.
    """
    read_name(weights)
    check_backend(io)
    check_folder("OUT", out)
    read_checkpoint(find_model(model))


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
