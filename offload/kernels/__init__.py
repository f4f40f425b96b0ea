"""Chooses the implementation of an op, and says which and why.

`reference` defines every op in plain torch. Faster ones live in offload.kernels.cpu (numba) and offload.kernels.gpu
(Triton), in the source tree's folder kernels/: a module for each op, with a function of the op's name and `refuses`,
which says of arguments why it will not take them. Nothing heavy is imported before an op is used.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from offload.errors import UsageError
from offload.hardware import probe_gpus

__all__ = ["IMPLEMENTATIONS", "OPS", "Choice", "available", "choose"]

IMPLEMENTATIONS = ("torch", "cpu", "gpu")
OPS: Mapping[str, tuple[str, ...]] = {  # op -> what there is beside the reference
    "linear": ("cpu",),
    "linear_many": ("cpu",),
    "linear_groups": ("cpu",),
    "linear_transposed": ("cpu",),
    "linear_int8": ("cpu", "gpu"),
    "linear_int4": ("cpu", "gpu"),
    "linear_lossless": ("cpu", "gpu"),
    "linears": ("cpu",),
    "unpack_lossless": ("cpu", "gpu"),
    "pack_lossless": ("cpu",),
    "quantize_int8": ("cpu",),
    "quantize_int4": ("cpu",),
    "dequantize_int8": ("cpu",),
    "dequantize_int4": ("cpu",),
    "decode_attention": ("cpu", "gpu"),
    "merge_attention": (),
    "gate_up_silu": ("cpu",),
    "adamw_step": ("cpu", "gpu"),
    "adamw_step_8bit": ("cpu",),
    "checksum": ("cpu",),
    "square_sum": ("cpu",),
    "rms_norm": ("cpu",),
    "rotary": ("cpu",),
    "silu_mul": ("cpu",),
    "move_along": ("cpu",),
    "gather_pages": ("gpu",),
}


@dataclass(frozen=True)
class Choice:
    """Which implementation of an op runs, and why.

    Attributes:
        op: its name.
        implementation: "torch" (the reference), "cpu" (numba) or "gpu" (Triton).
        why: a few words.
    """

    op: str
    implementation: str
    why: str

    def function(self) -> Callable[..., Any]:
        """The op. Imports the implementation; kernels are compiled when they are first called."""
        return getattr(self._module(), self.op)  # type: ignore[no-any-return]

    def refuses(self) -> Callable[..., str | None]:
        """Takes the op's arguments; says why the implementation would not, or None."""
        if self.implementation == "torch":
            return lambda *args, **kwargs: None
        return self._module().refuses  # type: ignore[no-any-return]

    def _module(self) -> Any:
        if self.implementation == "torch":
            return importlib.import_module("offload.kernels.reference")
        return importlib.import_module(f"offload.kernels.{self.implementation}.{self.op}")


def choose(op: str, device: str, *, exact: bool = False, forced: str | None = None) -> Choice:
    """The implementation of `op` for tensors on `device`.

    Args:
        op: one of OPS.
        device: "cpu" or "cuda", a torch device's type.
        exact: torch's own ops only, so that results are what torch alone would give.
        forced: an implementation by name, whatever is best.

    Raises:
        UsageError: there is no such op or implementation, or what was forced cannot run here.
    """
    if op not in OPS:
        raise UsageError(f"there is no op {op!r}; there are {', '.join(OPS)}")
    if forced is not None:
        if forced not in ("torch", *OPS[op]):
            raise UsageError(f"{op} has no implementation {forced!r}; it has torch, {', '.join(OPS[op])}")
        if forced != "torch" and (state := available()[forced]) != "yes":
            raise UsageError(f"{op} was to run on {forced!r}, which cannot be: {state}")
        return Choice(op, forced, "forced")
    if exact:
        return Choice(op, "torch", "exact results were asked for")
    kind = "gpu" if device == "cuda" else "cpu"
    if kind not in OPS[op]:
        return Choice(op, "torch", f"there is no {kind} kernel for it")
    if (state := available()[kind]) != "yes":
        return Choice(op, "torch", state)
    return Choice(op, kind, "measured faster" if kind == "cpu" else "made to be faster, not measured yet")


def available() -> dict[str, str]:
    """For "cpu" and "gpu": "yes", or "no: " followed by what is missing.

    Triton's interpreter (TRITON_INTERPRET=1) counts as a GPU: slow, for tests, on tensors in main memory.
    """
    cpu = "yes" if _found("numba") else "no: numba is not installed"
    gpus, why_none = ([], "") if _interprets() else probe_gpus()
    if not gpus and not _interprets():
        gpu = f"no: {why_none}"
    elif not _found("triton"):
        gpu = "no: triton is not installed (it comes with torch's CUDA build)"
    else:
        gpu = "yes"
    return {"cpu": cpu, "gpu": gpu}


def _interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")  # as Triton reads it


def _found(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # a broken parent package, or a stub in sys.modules
        return False
