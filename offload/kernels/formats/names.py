"""Names of weight formats as a user writes them, and what they ask for."""

from __future__ import annotations

import re

from offload.errors import UsageError

GROUPS = (32, 64, 128)
BITS = {"lossless": 12, "int8": 8, "int4": 4}  # of a weight, without scales and the like
_NAME = re.compile(r"(lossless|int8|int4)(?:-(\d+))?(-symmetric)?")


def read_name(text: str | None) -> tuple[str, int, bool] | None:
    """Kind, weights that share a scale (0 where there is none), and whether a scale has no offset; None for weights as
    they are stored.

    Raises:
        UsageError: there is no such format; names those that there are.
    """
    if text is None or text == "none":
        return None
    match = _NAME.fullmatch(text)
    if match is None or (match[1] != "int4" and (match[2] or match[3])) or (match[2] and int(match[2]) not in GROUPS):
        raise UsageError(
            f"weights={text!r} is not a format; there are none, lossless, int8, int4, int4-64, int4-128, each int4 "
            "also with -symmetric"
        )
    return (match[1], int(match[2] or 32), match[3] is not None) if match[1] == "int4" else (match[1], 0, False)
