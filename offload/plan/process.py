"""What a process takes before any weight: interpreter, libraries, kernels. Known where a run was seen, else about."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from pathlib import Path

from offload.hardware import cache_dir, rss_bytes, versions
from offload.units import MIB

KERNELS_NBYTES = 124 * MIB  # of numba and its kernels, in a process that has not loaded them yet
LIBRARIES_NBYTES = 480 * MIB  # of torch for the CPU and transformers, where no run was seen yet
NEAR = 8 * MIB  # two runs differ by that much, of two models: a plan that is to be followed leaves it free


def process_nbytes(exact: bool) -> int:
    """What a run's process takes before any weight.

    One that has loaded the libraries sees it in itself; any other takes what the last run with them took here.
    """
    kernels = 0 if exact or "numba" in sys.modules else KERNELS_NBYTES
    if "transformers.modeling_utils" in sys.modules:
        return rss_bytes() + kernels
    return _seen().get(_key(exact), LIBRARIES_NBYTES + (0 if exact else KERNELS_NBYTES))


def remember_process(nbytes: int, exact: bool) -> None:
    """Keeps what a run's process took before any weight, for plans."""
    known, key = _seen(), _key(exact)
    if abs(known.get(key, 0) - nbytes) <= NEAR // 2:
        return
    file = _file()
    part = file.with_suffix(f".{os.getpid()}")
    with suppress(OSError):  # a cache that cannot be written is none
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(known | {key: nbytes}))
        part.replace(file)


def _file() -> Path:
    return cache_dir() / "process.json"


def _key(exact: bool) -> str:
    now = versions()
    lean = " lean" if sys.modules.get("scipy", sys) is None else ""  # see offload/lean.py
    return f"torch {now['torch']} transformers {now['transformers']} {'exact' if exact else 'fast'}{lean}"


def _seen() -> dict[str, int]:
    try:
        found = json.loads(_file().read_text())
    except (OSError, ValueError):
        return {}
    return {str(k): v for k, v in found.items() if type(v) is int and v > 0} if isinstance(found, dict) else {}
