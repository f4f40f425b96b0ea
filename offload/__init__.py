"""offload runs and fine-tunes models larger than memory, at the speed the hardware allows.

    with offload.load("path-or-hub-id", cpu_memory="4GiB") as model:  # a checkpoint: never all in memory
        model.generate(**inputs)
    with offload.wrap(module, cpu_memory="2GiB") as module:  # a module you already hold: restored on exit
        module(x)

    with offload.finetuning("path-or-hub-id", offload_dir="/mnt/nvme") as trainer:  # optimizer state on disk
        trainer.step(batch)

Names are looked up when they are first used (PEP 562), so `import offload` loads no torch and starts no thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from offload.api import finetuning, load, pack, probe, wrap
    from offload.errors import (
        BudgetError,
        CheckpointError,
        ClosedError,
        DataError,
        FormatError,
        ModelError,
        OffloadError,
        PickleError,
        StorageError,
        StrictError,
        TrainingError,
        UsageError,
    )

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "CheckpointError",
    "ClosedError",
    "DataError",
    "FormatError",
    "ModelError",
    "OffloadError",
    "PickleError",
    "StorageError",
    "StrictError",
    "TrainingError",
    "UsageError",
    "__version__",
    "finetuning",
    "load",
    "pack",
    "probe",
    "wrap",
]

_API = ("finetuning", "load", "pack", "probe", "wrap")  # the rest of __all__ is errors


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'offload' has no attribute {name!r}; it has {', '.join(__all__)}")
    from importlib import import_module

    found: object = getattr(import_module("offload.api" if name in _API else "offload.errors"), name)
    globals()[name] = found  # the next look-up does not come here
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
