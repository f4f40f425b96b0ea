"""The file of answers: a line for each finished prompt, durable batch by batch, so that a killed run can go on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from offload.errors import DataError, StorageError, UsageError
from offload.tiers.durable import sync_folder, write_durably
from offload.tiers.locking import lock

Identity = Mapping[str, Any]


class Answers:
    """Appends answers, and knows which are there already. A context manager.

    Beside the file lies another with `.run` added to its name, which says what the answers belong to.

    Attributes:
        done: indexes of prompts that have their answer.
    """

    def __init__(self, path: Path, identity: Identity, count: int) -> None:
        """Begins the file, or goes on with it: a last line that was not finished is cut off.

        Args:
            path: the file of answers; its folder must exist.
            identity: what the answers follow from, as JSON has it. A file of another identity is refused.
            count: prompts in all.

        Raises:
            UsageError: another process writes to it, or it belongs to something else.
            DataError: it has a line that is no answer.
            StorageError: it cannot be written.
        """
        self.path = path
        identity_of(path)  # refuses a file of something else
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise StorageError(f"cannot be written: {error.strerror}", path=str(path), errno=error.errno) from error
        try:
            lock(self._fd, path, f"another process writes to {path}")
            before = identity_of(path)  # again: nobody else writes now
            if before is None:
                write_durably(_beside(path), json.dumps(identity, indent=1).encode())
            else:
                _same(path, before, json.loads(json.dumps(identity)))
            sync_folder(path.parent)
            self._order, end = _read(path, count)
            if end < os.fstat(self._fd).st_size:
                os.ftruncate(self._fd, end)
        except BaseException:
            os.close(self._fd)
            raise
        self.done = set(self._order)

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._fd)

    def add(self, answers: Sequence[Mapping[str, Any]]) -> None:
        """Appends answers, each with its `index`; they are durable on return. One that is there already stays as it is.

        Raises:
            StorageError: the disk is full or fails; what was durable before is so still.
        """
        new = [a for a in answers if a["index"] not in self.done]
        left = memoryview("".join(json.dumps(a, ensure_ascii=False) + "\n" for a in new).encode())
        try:
            while left:
                left = left[os.write(self._fd, left) :]
            os.fsync(self._fd)
        except OSError as error:
            path = str(self.path)
            raise StorageError(f"cannot be written: {error.strerror}", path=path, errno=error.errno) from error
        self._order += [a["index"] for a in new]
        self.done.update(a["index"] for a in new)

    def sort(self) -> None:
        """Puts the lines in the order of their prompts, once all are there; nothing can be added after it.

        The file is the old or the new one, whatever happens.

        Raises:
            StorageError: it cannot be written.
        """
        if self._order == sorted(self._order):
            return
        lines = self.path.read_bytes().splitlines(keepends=True)
        mode = os.fstat(self._fd).st_mode & 0o777
        ordered = sorted(zip(self._order, lines, strict=True), key=lambda pair: pair[0])
        write_durably(self.path, b"".join(line for _, line in ordered))
        self.path.chmod(mode)
        self._order.sort()


def identity_of(path: Path) -> dict[str, Any] | None:
    """What the answers in a file belong to; None where there are none yet, even if a run had begun.

    Raises:
        UsageError: there is a file that is no file of answers.
    """
    beside = _beside(path)
    if not path.exists() or (path.is_file() and not path.stat().st_size):
        return None
    try:
        found = json.loads(beside.read_text())
    except FileNotFoundError:
        raise UsageError(f"{path} is there already, and not of such a run; name another file") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{beside} cannot be read: {error}; remove it and {path} to begin anew") from error
    if not isinstance(found, dict):
        raise UsageError(f"{beside} does not say what {path} belongs to; remove both to begin anew")
    return found


def _beside(path: Path) -> Path:
    return path.with_name(path.name + ".run")


def _same(path: Path, before: Identity, now: Identity) -> None:
    for key in sorted({*before, *now}):
        if before.get(key) != now.get(key):
            raise UsageError(
                f"{path} was begun with {key}={before.get(key)!r}, and now it is {now.get(key)!r}: take what it was "
                f"begun with, name another file, or remove {path} and {_beside(path).name} to begin anew"
            )


def _read(path: Path, count: int) -> tuple[list[int], int]:
    """Indexes of the finished lines, in the file's order, and where the last of them ends."""
    order: list[int] = []
    seen: set[int] = set()
    end, lines = 0, path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            index = json.loads(line)["index"] if line.endswith(b"\n") else None
        except (ValueError, TypeError, KeyError):
            index = None
        if type(index) is not int or not 0 <= index < count or index in seen:
            if number == len(lines):  # what a kill or a power cut leaves
                break
            raise DataError("is no answer to one of the prompts, or a second one", str(path), number)
        order.append(index)
        seen.add(index)
        end += len(line)
    return order, end
