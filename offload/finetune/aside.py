"""A model's files written aside and moved into their folder when all are there: until then the older model is whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from offload.finetune.written import written
from offload.tiers.durable import sync_folder

PART = ".model.part"  # a folder in the model's own: renaming does not cross file systems
WEIGHTS = ("model", "adapter_model")  # stems of files that a new model replaces, however many there are of either
LAST = ("config.json", "adapter_config.json")


@contextmanager
def aside(folder: Path) -> Iterator[Path]:
    """An empty folder whose files move to `folder` at the end, over older ones; nothing moves if the body raises.

    Weights move first and configurations last, and an older model's other weights go only then: single files win over
    an index, so that what a reader finds is the older model, then the newer one, but for the moment of renaming.

    Raises:
        StorageError: something cannot be written.
    """
    part = folder / PART
    with written(folder):
        shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
        part.mkdir(parents=True)
        try:
            yield part
            _move(part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _move(part: Path, folder: Path) -> None:
    names = sorted((p.name for p in part.iterdir()), key=lambda n: (n in LAST, not n.endswith(".safetensors"), n))
    for name in names:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        os.rename(part / name, folder / name)
    for stem in WEIGHTS:
        patterns = (f"{stem}.safetensors", f"{stem}-*.safetensors", f"{stem}.safetensors.index.json")
        if any(Path(name).match(pattern) for name in names for pattern in patterns):
            for old in (p for pattern in patterns for p in folder.glob(pattern) if p.name not in names):
                old.unlink()
    sync_folder(folder)
