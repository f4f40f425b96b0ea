"""Reads a TOML table as if a stranger had written it: every key known, every number in range, every error in place."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from offload.errors import UsageError
from offload.units import parse_bytes, parse_rate

MOST = 1e18  # no size, rate or count of a machine is larger
LONGEST = 1e6  # seconds


class Fields:
    """One table; every key is taken once, and `done` refuses what was not asked for.

    Args:
        values: as tomllib gives it.
        where: its path in the file, for errors.
    """

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, Mapping):
            raise UsageError(f"{where or 'the profile'} must be a table, not {values!r}")
        self._values, self._where, self._known = dict(values), where, list[str]()

    def _at(self, key: str) -> str:
        return f"{self._where}.{key}" if self._where else key

    def _take(self, key: str, default: Any) -> Any:
        self._known.append(key)
        if key in self._values:
            return self._values.pop(key)
        if default is _MUST:
            near = difflib.get_close_matches(key, list(self._values), n=1)
            hint = f"; {near[0]!r} looks like it" if near else ""
            raise UsageError(f"{self._at(key)} is missing{hint}")
        return default

    def text(self, key: str, default: Any = ..., among: Sequence[str] | None = None) -> Any:
        value = self._take(key, _MUST if default is ... else default)
        if value is None:
            return None
        if not isinstance(value, str):
            raise UsageError(f"{self._at(key)}={value!r} must be a text")
        if among is not None and value not in among:
            raise UsageError(
                f"{self._at(key)}={value!r} is not known; it is one of {', '.join(among)}{_near(value, among)}"
            )
        return value

    def number(self, key: str, default: Any = ..., low: float = 0.0, high: float = MOST) -> float:
        value = self._take(key, _MUST if default is ... else default)
        return number(value, self._at(key), low, high)

    def whole(self, key: str, default: Any = ..., low: int = 0, high: int = int(MOST)) -> int:
        value = self._take(key, _MUST if default is ... else default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise UsageError(f"{self._at(key)}={value!r} must be a whole number from {low} to {high}")
        return value

    def nbytes(self, key: str) -> int:
        """A number of bytes, or a text such as "24GiB"."""
        value = parse_bytes(self._take(key, _MUST), self._at(key))
        return int(number(value, self._at(key), 0, MOST))

    def rate(self, key: str, default: Any = ...) -> float | None:
        """Bytes per second, or a text such as "25GB/s"."""
        value = self._take(key, _MUST if default is ... else default)
        return None if value is None else rate(value, self._at(key))

    def table(self, key: str) -> dict[str, Any]:
        """A table of its own; empty when it is left out."""
        value = self._take(key, {})
        if not isinstance(value, Mapping):
            raise UsageError(f"{self._at(key)} must be a table, not {value!r}")
        return dict(value)

    def tables(self, key: str) -> list[Fields]:
        """[[key]] sections, in order."""
        value = self._take(key, [])
        if not isinstance(value, list):
            raise UsageError(f"{self._at(key)} must be a list of tables: [[{key}]]")
        return [Fields(one, f"{self._at(key)}[{k}]") for k, one in enumerate(value)]

    def numbers(self, key: str, read: Callable[[Any, str], float] | None = None) -> dict[str, float]:
        """A table whose values are numbers from 0 on, or what `read` makes of them."""
        reader = read or (lambda v, at: number(v, at, 0, MOST))
        return {name: reader(value, self._at(f"{key}.{name}")) for name, value in self.table(key).items()}

    def rows(self, key: str, columns: Sequence[str], optional: int = 1, *, must: bool = True) -> list[list[Any]]:
        """A list of rows such as [[4096, 1.2e9, 0.02]]; the last `optional` columns may be left out."""
        value = self._take(key, _MUST if must else [])
        at = self._at(key)
        form = f"[{', '.join(columns)}]"
        if not isinstance(value, list) or (must and not value):
            raise UsageError(f"{at} must be a list of rows {form}")
        for row in value:
            if not isinstance(row, list) or not len(columns) - optional <= len(row) <= len(columns):
                raise UsageError(f"{at} has the row {row!r}, which is not {form}")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        value = self._take(key, [])
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise UsageError(f"{self._at(key)} must be a list of texts")
        return tuple(value)

    def whole_numbers(self, key: str) -> tuple[int, ...]:
        value = self._take(key, [])
        if not isinstance(value, list) or not all(type(v) is int and 0 < v < MOST for v in value):
            raise UsageError(f"{self._at(key)} must be a list of whole numbers above 0")
        return tuple(value)

    def done(self) -> None:
        """Refuses keys that nobody asked for.

        Raises:
            UsageError: names the first of them, and the known one that is nearest.
        """
        for key in self._values:
            raise UsageError(
                f"{self._at(key)} is not known{_near(key, self._known)}; known are {', '.join(self._known)}"
            )


_MUST: Any = object()


def number(value: Any, at: str, low: float, high: float) -> float:
    """A finite number in a range."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UsageError(f"{at}={value!r} must be a number")
    if not low <= value <= high:
        raise UsageError(f"{at}={value!r} must lie from {low:g} to {high:g}")
    return float(value)


def rate(value: Any, at: str) -> float:
    """Bytes per second, above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise UsageError(f'{at}={value!r} is not a rate; write it like "8GB/s"')
    return number(parse_rate(value, at), at, 1.0, MOST)


def _near(key: str, known: Sequence[str]) -> str:
    found = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""
