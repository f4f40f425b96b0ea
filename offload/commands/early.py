"""What can be wrong with a fine-tuning run before torch is loaded: its configuration's keys, its model's folder, its
data's lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from offload.checkpoint import find
from offload.commands.bar import bar
from offload.finetune.config import Config
from offload.finetune.files import DataFiles, index_data
from offload.finetune.reading import read_config


@dataclass(frozen=True, kw_only=True)
class Early:
    """What was found to be right.

    Attributes:
        config: the configuration.
        directory: the model's folder.
        data: the index of every file of data.
    """

    config: Config
    directory: Path
    data: DataFiles


def check(path: str, overrides: Sequence[str], *, quiet: bool) -> Early:
    """Reads the configuration, looks for the model, and reads every line of the data once.

    Raises:
        UsageError, DataError, CheckpointError: see offload.errors.
    """
    config = read_config(path, overrides)
    directory = find(config.model)
    with bar(Console(stderr=True, quiet=quiet)) as progress:
        return Early(config=config, directory=directory, data=index_data(config.data, progress=progress))
