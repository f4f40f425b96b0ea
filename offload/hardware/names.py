"""What names this machine and its software in caches and reports."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

from offload.hardware.gpus import gpus
from offload.hardware.kernel import PROC
from offload.hardware.processors import cpu_info
from offload.units import GIB


def versions() -> dict[str, str | None]:
    """Versions of what decides speed and results, by package name; None where it is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "transformers", "safetensors", "numpy", "numba", "triton", "huggingface_hub"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def fingerprint(proc: Path = PROC) -> str:
    """Twelve hex digits that change when measurements of this machine stop being true: host, cores, RAM, GPUs."""
    import psutil

    cpu = cpu_info(proc)
    ram = round(psutil.virtual_memory().total / GIB)  # a kernel update moves it by a few pages
    facts = [platform.node(), platform.release(), cpu.model, cpu.cores, ram, *(gpu.uuid for gpu in gpus())]
    return hashlib.sha256("\n".join(map(str, facts)).encode()).hexdigest()[:12]


def cache_dir() -> Path:
    """Where measurements are kept: $OFFLOAD_CACHE, or offload/ under $XDG_CACHE_HOME or ~/.cache. Not created here."""
    if own := os.environ.get("OFFLOAD_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "offload"
