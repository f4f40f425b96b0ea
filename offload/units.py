"""Bytes, rates and seconds as people write them. The only place where 1000 and 1024 meet.

parse_bytes("8GiB") == 8 * 1024**3        parse_rate("4GB/s") == 4e9
parse_bytes("8GB") == 8 * 1000**3         format_bytes(8589934592) == "8.00 GiB"
"""

from __future__ import annotations

import math
import re

from offload.errors import UsageError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgtp", 1):
    _UNITS[f"{_letter}ib"] = 1024**_power
    _UNITS[f"{_letter}b"] = 1000**_power
_BARE = {"k": 1024, "m": 1024**2, "g": 1024**3, "t": 1024**4, "p": 1024**5}  # "8G", as cgroups and llama.cpp read it
_PATTERN = re.compile(r"\s*([0-9][0-9_,]*(?:\.[0-9]*)?|\.[0-9]+)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_bytes(value: str | int | float, name: str = "size") -> int:
    """A number of bytes from "8GiB", "8GB", "512 MiB", "8G" (binary), or a plain number of bytes.

    Args:
        value: the text or number.
        name: the option to name in an error.

    Raises:
        UsageError: not a size, negative, or not finite.
    """
    if isinstance(value, bool):
        raise UsageError(f'{name}={value!r} is not a size; write it like "8GiB" or "500MB"')
    if isinstance(value, int | float):
        if not math.isfinite(value) or value < 0:
            raise UsageError(f"{name}={value!r} is not a size: it must be finite and at least 0")
        return int(value)
    found = _PATTERN.fullmatch(value)
    unit = found[2].lower() if found else ""
    if not found or (unit not in _UNITS and unit not in _BARE):
        raise UsageError(f'{name}={value!r} is not a size; write it like "8GiB", "500MB" or a number of bytes')
    return int(float(found[1].replace("_", "").replace(",", "")) * (_UNITS.get(unit) or _BARE[unit]))


def parse_memory(value: str | int | float, name: str) -> int:
    """`parse_bytes` of an amount of memory, in which a bare small number has lost its unit: "4" is asked for as 4GiB.

    Raises:
        UsageError: not a size, or fewer bytes than any memory has.
    """
    nbytes = parse_bytes(value, name)
    if 0 < nbytes < 1024:
        raise UsageError(f'{name}={value} means {nbytes} bytes; did you mean "{nbytes}GiB"?')
    return nbytes


def parse_rate(value: str | int | float, name: str = "rate") -> float:
    """Bytes per second from "4GB/s", "500MiB/s", or a plain number of bytes per second.

    Raises:
        UsageError: not a rate, or not above 0.
    """
    text = value
    if isinstance(text, str):
        text = re.sub(r"\s*(/s|ps)\s*$", "", text.strip(), flags=re.IGNORECASE)
    try:
        rate = float(parse_bytes(text, name))
    except UsageError:
        raise UsageError(f'{name}={value!r} is not a rate; write it like "8GB/s"') from None
    if rate <= 0:
        raise UsageError(f"{name}={value!r} is not a rate: it must be above 0")
    if isinstance(text, str) and rate < 1000 and text.replace(".", "").isdecimal():
        raise UsageError(f'{name}={value!r} means {rate:g} bytes per second; did you mean "{text.strip()}GB/s"?')
    return rate


def format_bytes(nbytes: float) -> str:
    """Binary units with three significant digits: 3.21 GiB, 512 B."""
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024 or unit == "TiB":
            return f"{int(size)} B" if unit == "B" else f"{size:.{2 if abs(size) < 10 else 1}f} {unit}"
        size /= 1024
    raise AssertionError("unreachable")


def format_moved(nbytes: float) -> str:
    """Bytes that pass, in the units of rates: 58.52 GB, 11.85 MB."""
    size = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 1000 or unit == "GB":
            return f"{size:.2f} {unit}"
        size /= 1000
    raise AssertionError("unreachable")


def format_rate(bytes_per_s: float) -> str:
    """Decimal units, as disks and links are sold: 3.52 GB/s."""
    return f"{format_moved(bytes_per_s)}/s"


def format_count(count: int) -> str:
    """A number of parameters with three figures: 9.48 M, 672 M, 70.6 B."""
    for size, unit in ((10**9, " B"), (10**6, " M"), (10**3, " k")):
        if count >= 0.9995 * size:
            amount = count / size
            return f"{amount:,.{2 if amount < 9.995 else 1 if amount < 99.95 else 0}f}{unit}"
    return str(count)


def format_seconds(seconds: float) -> str:
    """0.83 s, 12.1 ms, 24.0 us, 3 min 20 s."""
    if 0 < seconds < 0.000_995:
        return f"{seconds * 1e6:.1f} us"
    if seconds < 0.1:
        return f"{seconds * 1e3:.1f} ms"
    if seconds < 120:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60)} s"
