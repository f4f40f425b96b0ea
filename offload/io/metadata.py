"""The metadata object of a safetensors header: strings to strings, and never more of them than a limit."""

from __future__ import annotations

import json
import re

_SPACE = re.compile(r"[ \t\n\r]*")
_JSON = json.JSONDecoder()


def read_strings(text: str, limit: int) -> tuple[dict[str, str], int]:
    """Read the object of strings at the start of a text, string by string, so that nothing else is ever built.

    Args:
        text: begins with "{"; more may follow the object.
        limit: pairs at most.

    Returns:
        The object and where in the text it ends.

    Raises:
        ValueError, IndexError: not such an object, a key twice, or too many; IndexError where the text ends too early.
    """
    found: dict[str, str] = {}
    at = _skip_space(text, 1)
    if text[at] == "}":
        return found, at + 1
    while True:
        key, at = _string(text, at)
        at = _skip_space(text, at)
        if text[at] != ":":
            raise ValueError(f"expected ':', found {text[at]!r}")
        if key in found or len(found) >= limit:
            raise ValueError(f"the key {key[:40]!r} occurs twice or is one too many")
        found[key], at = _string(text, _skip_space(text, at + 1))
        at = _skip_space(text, at)
        if text[at] == "}":
            return found, at + 1
        if text[at] != ",":
            raise ValueError(f"expected ',' or '}}', found {text[at]!r}")
        at = _skip_space(text, at + 1)


def _string(text: str, at: int) -> tuple[str, int]:
    if text[at] != '"':
        raise ValueError(f"expected a string, found {text[at : at + 16]!r}")
    value, end = _JSON.raw_decode(text, at)
    value.encode()  # a UnicodeEncodeError, which is a ValueError, for half a surrogate pair
    return value, end


def _skip_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at
