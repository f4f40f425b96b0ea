"""What a run writes down: a line of JSON for every step, and tensorboard's files where tensorboard is installed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from offload.errors import UsageError
from offload.finetune.written import written

NAME = "log.jsonl"
ABSENT = "tensorboard is not installed (pip install tensorboard), so only log.jsonl is written"


def check_journal(folder: Path, *, report_to: str, resume: bool) -> None:
    """Refuses what a journal would refuse, before anything large is begun.

    Raises:
        UsageError: tensorboard is asked for and not installed; or a run that is not resumed is in the folder.
    """
    path = folder / NAME
    if not resume and path.exists() and path.stat().st_size:
        raise UsageError(
            f"{folder} holds a run already ({NAME}); go on with --resume, or name another train.output_dir"
        )
    if report_to == "tensorboard" and find_spec("tensorboard") is None:
        raise UsageError(f"train.report_to=tensorboard: {ABSENT}")


class Journal:
    """The journal of one output folder. A context manager.

    Attributes:
        note: what the user should know.
        on_note: told what the user should know later on; tensorboard's files are given up when they cannot be written.

    Args:
        folder: output_dir; it is made.
        report_to: auto, tensorboard or none.
        keep: steps whose lines stay; those of later ones are cut off, because a resumed run takes them again. None
            begins anew.
    """

    def __init__(self, folder: Path, *, report_to: str, keep: int | None) -> None:
        self.path = folder / NAME
        with written(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            if keep is not None:
                _cut(self.path, keep)
            self._file = self.path.open("a", encoding="utf-8")
        self._board: Any = None
        self.note = ""
        self.on_note: Callable[[str], None] = lambda text: None
        if report_to != "none":
            if find_spec("tensorboard") is None:
                self.note = ABSENT
            else:
                with written(folder / "runs"):
                    from torch.utils.tensorboard import SummaryWriter

                    self._board = SummaryWriter(str(folder / "runs"), purge_step=None if keep is None else keep + 1)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self._to_board(lambda board: board.close())
        with written(self.path):
            self._file.close()

    def write(self, line: Mapping[str, Any]) -> None:
        """Adds a line; it must have `step`. Numbers also go to tensorboard, under train/ or, if the line has eval_loss,
        under eval/.

        Raises:
            StorageError: it cannot be written.
        """
        with written(self.path):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        group = "eval" if "eval_loss" in line else "train"
        for key, value in line.items():
            if key != "step" and isinstance(value, int | float):
                tag = f"{group}/{key.removeprefix('eval_')}"
                self._to_board(lambda board, tag=tag, value=value: board.add_scalar(tag, value, line["step"]))

    def _to_board(self, write: Callable[[Any], None]) -> None:
        """Tensorboard's files are a copy of log.jsonl: no run ends because they cannot be written."""
        if self._board is None:
            return
        try:
            write(self._board)
        except OSError as error:
            self._board = None
            self.on_note(f"tensorboard's files cannot be written ({error}); from here on only {NAME} is")


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The lines of a journal, a torn last one left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def _cut(path: Path, keep: int) -> None:
    if not path.exists():
        return
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(line) + "\n" for line in read_journal(path) if line["step"] <= keep))
    os.replace(part, path)
