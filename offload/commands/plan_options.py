"""Options of `offload plan`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """The options of `offload plan`; see its help."""

    model: str
    overrides: tuple[str, ...] = ()
    cpu_memory: str | None = None
    gpu_memory: str | None = None
    resident: str | None = None
    device: str | None = None
    link: str | None = None
    dtype: str = "auto"
    prompt_tokens: int = 512
    new_tokens: int = 128
    batch: str = "1"
    weights: str | None = None
    exact: bool = False
    slots: int | None = None
    hardware: str | None = None
    what_if: tuple[str, ...] = ()
    output: str | None = None
    json: bool = False
