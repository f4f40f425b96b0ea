"""Every error a user can cause, in one tree. Messages say what was asked, what there is, and what to try.

OffloadError
├── UsageError            an argument is wrong (also a ValueError)
├── BudgetError           it cannot fit; the message carries the arithmetic (also a MemoryError)
├── CheckpointError       a checkpoint cannot be used
│   ├── FormatError       a safetensors file or an index breaks the format's rules
│   ├── PackingError      a matrix needs more room packed than was set aside for it
│   └── PickleError       a checkpoint in a format that runs code when it is read
├── StorageError          a read or write failed; carries file and offset (also an OSError)
├── ModelError            a module cannot be run this way
├── DataError             a line of training data or prompts cannot be used; carries file and line
├── TrainingError         training cannot go on; what was committed is whole
├── StrictError           a fall-back that strict mode forbids
└── ClosedError           something was used after it was closed
"""

from __future__ import annotations


class OffloadError(Exception):
    """Base of every error that offload raises on purpose."""


class UsageError(OffloadError, ValueError):
    """An argument is wrong: what was asked, what is known, what to try."""


class BudgetError(OffloadError, MemoryError):
    """The request cannot fit in the memory it was given; the message shows the arithmetic."""


class CheckpointError(OffloadError):
    """A checkpoint cannot be used."""


class FormatError(CheckpointError):
    """A safetensors file or index breaks the format's rules."""


class PackingError(CheckpointError):
    """A matrix needs more room packed than was set aside for it; its numbers are unusual."""


class PickleError(CheckpointError):
    """A pickle checkpoint: reading it would run code from the file, so it is refused."""


class StorageError(OffloadError, OSError):
    """A read or write failed.

    Attributes:
        path: the file.
        offset: the first byte of the failed transfer, or None when the file could not be opened.
        errno: the operating system's number where there is one.
    """

    def __init__(self, message: str, *, path: str, offset: int | None = None, errno: int | None = None) -> None:
        where = path if offset is None else f"{path} at byte {offset:,}"
        super().__init__(f"{message} ({where})")
        self.path, self.offset, self.errno = path, offset, errno

    def __str__(self) -> str:
        return str(self.args[0])


class ModelError(OffloadError):
    """A module cannot be run the way that was asked."""


class DataError(OffloadError):
    """A line of training data or of prompts cannot be used.

    Attributes:
        path: the file.
        line: its number, from 1.
    """

    def __init__(self, message: str, path: str, line: int) -> None:
        super().__init__(f"{path}:{line}: {message}")
        self.path, self.line = path, line


class TrainingError(OffloadError):
    """Training cannot go on, for a reason in its own numbers or in what it runs on; the last commit is whole."""


class StrictError(OffloadError):
    """A fall-back was needed and strict mode forbids it."""


class ClosedError(OffloadError):
    """The object was closed."""
