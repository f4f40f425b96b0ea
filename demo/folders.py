"""Folders that are there whole or not at all, so that an interrupted demo leaves nothing to clean up."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SCRATCH = Path(__file__).parent / "scratch"
"""Where the demo keeps its checkpoints between runs; git ignores it."""


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """Hands out an empty folder beside `folder`; it takes that name when the block ends well, and goes when it fails.

    What a killed run left under the temporary name is removed first.
    """
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
