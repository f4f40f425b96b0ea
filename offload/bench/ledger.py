"""What a benchmark has done so far: JSON lines that are on the disk before the next thing happens."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from offload.errors import UsageError

Line = dict[str, Any]


class Ledger:
    """An append-only file of lines, each with a `kind` and the name of its `cell`.

    Args:
        path: goes on with what is there. A last line that was cut off is taken away.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[Line] = []
        self.reload()

    def reload(self) -> None:
        """Takes in what another process has added."""
        self.lines.clear()
        if self.path.exists():
            whole = self._read(self.path.read_bytes())
            with self.path.open("r+b") as file:
                file.truncate(whole)

    def _read(self, text: bytes) -> int:
        """Takes whole lines; returns where they end."""
        end = 0
        for number, line in enumerate(text.splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):
                break
            try:
                found = json.loads(line)
            except ValueError:
                found = None
            if not isinstance(found, dict) or "kind" not in found:
                raise UsageError(f"{self.path}, line {number}, is no line of this benchmark; name another file")
            self.lines.append(found)
            end += len(line)
        return end

    def add(self, line: Line) -> None:
        """Appends; when this returns, a power cut loses nothing of it."""
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.lines.append(line)

    def of(self, kind: str) -> dict[str, Line]:
        """Lines of a kind by their cell; of several the last."""
        return {line["cell"]: line for line in self.lines if line["kind"] == kind and "cell" in line}

    def all_of(self, kind: str) -> list[Line]:
        return [line for line in self.lines if line["kind"] == kind]
