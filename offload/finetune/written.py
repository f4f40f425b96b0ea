"""What others write for us, such as a tokenizer's files, fails as our own writes do: with a StorageError."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from offload.errors import OffloadError, StorageError


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Names the file, or else this path, where something cannot be written.

    Raises:
        StorageError: in place of an OSError, or of what tokenizers raises for one.
    """
    try:
        yield
    except OffloadError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        if number is None and "(os error " not in str(error):  # as Rust has it
            raise
        reason = error.strerror if isinstance(error, OSError) else str(error)
        where = error.filename if isinstance(error, OSError) else None
        raise StorageError(
            f"cannot be written: {reason}. What was committed is whole: put this right and go on with resume",
            path=str(where or path), errno=number,
        ) from error  # fmt: skip
