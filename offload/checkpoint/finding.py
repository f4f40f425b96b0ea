"""The folder of a model, by its path or its name on the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path

from offload.errors import CheckpointError, UsageError

MANIFEST = "offload.json"  # of a packed checkpoint


def find(model: str | os.PathLike[str]) -> Path:
    """The folder of a model: a path, or a hub id that is looked up in the cache and then downloaded.

    Raises:
        CheckpointError: there is no such folder and no such model can be had.
        UsageError: it is no name at all.
    """
    if not isinstance(model, str | os.PathLike):
        raise UsageError(
            f"a model is a folder with config.json and safetensors, or a hub id, but this is a {type(model).__name__}; "
            "a module that is in memory runs with offload.wrap, and is trained with offload.finetuning(method='full')"
        )
    path = Path(model)
    if path.is_dir():
        return path
    text = os.fspath(model)
    if path.exists() or text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise CheckpointError(
            f"{text} is not a folder; a model is a folder with config.json and safetensors, or a hub id"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(text, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{text} is neither a folder here nor a model that could be downloaded: {reason}"
        ) from error


def check_config(directory: Path) -> None:
    """Whether a model's folder has a configuration, right or wrong.

    Raises:
        CheckpointError: it has none.
    """
    if not (directory / "config.json").is_file() and (directory / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{directory} holds adapters, no whole model. Put them into their model's weights first, with the package "
            "peft: PeftModel.from_pretrained(model, folder).merge_and_unload().save_pretrained(out)"
        )
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory} has no config.json; a model is a folder with config.json and safetensors")
