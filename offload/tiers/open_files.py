"""Files that somebody reads for a while, by path: each is opened when it is first asked for, and closed at the end."""

from __future__ import annotations

from offload.io.engine import Engine, File


class OpenFiles(dict[str, File]):
    """The open files of one reader. A context manager: what they hold on disk may go once everybody has left.

    Args:
        engine: lends the files; those that others have open are lent again.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __missing__(self, path: str) -> File:
        """Raises StorageError: it cannot be opened."""
        file = self[path] = self._engine.open(path)
        return file

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(self, *error: object) -> None:
        for file in self.values():
            file.close()
        self.clear()
