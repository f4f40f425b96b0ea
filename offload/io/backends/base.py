"""What the engine asks of a backend: files, and blocks that are transferred once each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from offload.io.parts import Part

MOST_PARTS = 1024  # in one transfer: Linux takes no more (IOV_MAX)


@dataclass(frozen=True, slots=True)
class FileStatus:
    """What a descriptor refers to; `identity` is equal for two descriptors of one file."""

    nbytes: int
    is_regular: bool
    identity: tuple[int, int]


class Block:
    """One transfer that a backend is asked to attempt once.

    The engine owns a block and its parts, and continues it after a short transfer; the backend may touch the memory
    only between start() and complete().

    Attributes:
        is_write: the direction.
        fd: the descriptor.
        is_direct: fd bypasses the page cache.
        offset: first byte in the file.
        parts: the memory, one part after the other; all their bytes together are what is to be transferred. A backend
            may take the first `MOST_PARTS` of them, which is a short transfer.
    """

    __slots__ = ("fd", "is_direct", "is_write", "offset", "parts")
    fd: int
    is_direct: bool
    is_write: bool
    offset: int
    parts: Sequence[Part]

    def complete(self, result: int | OSError) -> None:
        """Report the bytes transferred (0 at the end of file) or the error. Never raises. Called once per start."""
        raise NotImplementedError


class Files(Protocol):
    """Opening, asking and closing. Every error is an OSError."""

    def open(self, path: str, *, is_writable: bool) -> int:
        """A buffered descriptor of an existing file; never waits, not even for a named pipe."""

    def adopt(self, fd: int) -> int:
        """Make a descriptor that the caller opened a buffered, close-on-exec one, and return it."""

    def open_direct(self, fd: int, path: str, *, is_writable: bool) -> int:
        """A second descriptor of the same file, with O_DIRECT; EINVAL when the file system refuses."""

    def alignment(self, fd: int) -> int:
        """What offsets and addresses of direct transfers must be multiples of; 0 when they are not supported."""

    def status(self, fd: int) -> FileStatus:
        """Size and identity, now."""

    def identity(self, path: str) -> tuple[int, int] | None:
        """The identity of the file that lies at a path, or None when there is none."""

    def sync(self, fd: int) -> None:
        """Make what was written durable."""

    def close(self, fd: int) -> None:
        """Close a descriptor that no started block uses."""


class Backend(Protocol):
    """Transfers blocks. The engine keeps at most `read_depth` reads and `write_depth` writes started at a time, which
    bounds every queue in a backend.

    Attributes:
        name: as in BACKENDS.
        files: opens the files that this backend can transfer.
        read_depth: blocks.
        write_depth: blocks.
    """

    name: str
    files: Files
    read_depth: int
    write_depth: int

    def start(self, blocks: Sequence[Block]) -> None:
        """Begin each transfer and return without waiting; complete() follows from any thread, even from in here."""

    def close(self) -> None:
        """Stop. Called with no block started; joins what threads there are. May be called twice."""
