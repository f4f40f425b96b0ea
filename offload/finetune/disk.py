"""Whether the disk has room for a run, before anything is written; and what is left of one that is finished."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

from offload.errors import BudgetError, StorageError
from offload.finetune.outlook import Outlook
from offload.tiers.durable import write_durably
from offload.units import format_bytes

FINISHED = "finished.json"
STATE = (
    "state.json",
    "state.bin",
    "state.lock",
    "weights-[0-9]*-[0-9]*.bin",
)  # the manifest first: without it, all else is nothing


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A run that came to its end, whose state was removed.

    Attributes:
        step: its last one.
        model: folder of what came out.
    """

    step: int
    model: str


def check_room(outlook: Outlook, offload_dir: Path, output_dir: Path, limit: int | None, *, resume: bool) -> None:
    """Compares what a run will take with what it may and with what is free.

    Room that the state has taken already counts as free, and a resumed run is not asked for its models again.

    Raises:
        BudgetError: it takes more than `limit` in offload_dir.
        StorageError: a disk has not as much free.
    """
    sums = " + ".join(f"{format_bytes(n)} ({what})" for what, n in outlook.disk_parts.items()) or "nothing"
    if limit is not None and outlook.disk_nbytes > limit:
        raise BudgetError(
            f"budgets.disk_limit={format_bytes(limit)} is less than this run takes in {offload_dir}: {sums}. Give at "
            f"least {format_bytes(outlook.disk_nbytes)}, or take an optimizer with less state (train.optim=adamw_8bit "
            "has half, adafactor a third), or method=lora"
        )
    wanted: defaultdict[int, int] = defaultdict(int)  # by file system
    folders: dict[int, Path] = {}
    output = 0 if resume else outlook.output_nbytes
    for folder, nbytes in ((offload_dir, outlook.disk_nbytes - _taken(offload_dir)), (output_dir, output)):
        there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
        wanted[os.stat(there).st_dev] += max(0, nbytes)
        folders[os.stat(there).st_dev] = there
    for device, nbytes in wanted.items():
        status = os.statvfs(folders[device])
        free = status.f_bavail * status.f_frsize
        if nbytes > free:
            raise StorageError(
                f"this run takes {sums} and {format_bytes(outlook.output_nbytes)} for what comes out. "
                f"{format_bytes(nbytes)} of it would still go to this disk, but {format_bytes(free)} are free. Make "
                "room, or name other folders (budgets.offload_dir, train.output_dir)",
                path=str(folders[device]),
            )


def finish_state(offload_dir: Path, finished: Finished) -> None:
    """Removes the state of a run that is complete and saved; a line remains for whoever resumes it."""
    write_durably(offload_dir / FINISHED, json.dumps(asdict(finished)).encode())
    for pattern in STATE:
        for path in offload_dir.glob(pattern):
            path.unlink()


def read_finished(offload_dir: Path) -> Finished | None:
    """What `finish_state` left; None if the run is not finished, or its state was kept."""
    try:
        found = json.loads((offload_dir / FINISHED).read_bytes())
        return Finished(step=int(found["step"]), model=str(found["model"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def forget_finished(offload_dir: Path) -> None:
    """A new run begins in the folder."""
    (offload_dir / FINISHED).unlink(missing_ok=True)


def _taken(offload_dir: Path) -> int:
    """Bytes of state that are there already."""
    return sum(path.stat().st_size for pattern in STATE for path in offload_dir.glob(pattern))
