"""Measures this machine, or fetches what was measured before."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from offload.checkpoint import find, open_checkpoint
from offload.errors import UsageError
from offload.io.engine import Engine
from offload.kernels.formats.weights import parse_weights
from offload.probes.effort import FULL, QUICK, TINY, Effort
from offload.probes.subject import Subject, common, of_model
from offload.probes.survey import Progress, Survey
from offload.profile import Profile, own_profile, save_profile

EFFORTS = {effort.name: effort for effort in (QUICK, FULL, TINY)}


def probe(
    model: str | os.PathLike[str] | None = None,
    *,
    effort: str | None = None,
    offload_dir: str | os.PathLike[str] | None = None,
    weights: str | None = None,
    progress: Progress = lambda *_: None,
) -> Profile:
    """What this machine does, in seconds and bytes per second: what plans and predictions rest on.

    It is kept, under the machine's fingerprint, and used by everything that plans from then on. Nothing else should run
    meanwhile; a profile says how quiet it was.

    Args:
        model: a folder or hub id, whose shapes, formats and files are measured; default: common shapes, and a scratch
            file in `offload_dir`.
        effort: "quick" (under a minute) or "full" (five minutes); default: what was measured before, or quick.
        offload_dir: a folder on the disk that training or swapping would write to; default: that for temporary files.
        weights: a format to measure beside those that the model has; all are in a full one.
        progress: called with (what is measured, parts done, parts in all).

    Raises:
        UsageError, CheckpointError, StorageError: see offload.errors.
    """
    chosen = _effort(effort)
    wanted = parse_weights(weights)
    directory = find(model) if model is not None else None
    if effort is None and (known := own_profile(directory)) is not None:
        return known
    formats = (_format(str(wanted)),) if wanted is not None else ()
    folder = Path(offload_dir or tempfile.gettempdir())
    profile = Survey(_subject(directory), chosen, folder, formats, progress).run()
    save_profile(profile, directory)
    return profile


def _effort(name: str | None) -> Effort:
    if name is not None and name not in EFFORTS:
        raise UsageError(f"effort={name!r} is not known; it is quick or full")
    return EFFORTS[name or "quick"]


def _format(weights: str) -> str:
    return weights.removesuffix("-symmetric")


def _subject(directory: Path | None) -> Subject:
    if directory is None:
        return common()
    with Engine() as engine:
        return of_model(directory.name, open_checkpoint(directory, engine))
