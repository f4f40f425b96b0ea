"""Chooses the implementation of an op, and says which and why.

Ops arrive by name with their kernels; today every op is torch's, and this module only tells what could run here. The
implementations live in offload.kernels.cpu (numba) and offload.kernels.gpu (Triton), in the source tree's folder
kernels/. Nothing heavy is imported: a package is looked for, not loaded.
"""

from __future__ import annotations

import importlib.util

from offload.hardware import probe_gpus

__all__ = ["available"]


def _found(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # a broken parent package, or a stub in sys.modules
        return False


def available() -> dict[str, str]:
    """For "cpu" and "gpu": "yes", or "no: " followed by what is missing."""
    cpu = "yes" if _found("numba") else "no: numba is not installed"
    gpus, why_none = probe_gpus()
    if not gpus:
        gpu = f"no: {why_none}"
    elif not _found("triton"):
        gpu = "no: triton is not installed (it comes with torch's CUDA build)"
    else:
        gpu = "yes"
    return {"cpu": cpu, "gpu": gpu}
