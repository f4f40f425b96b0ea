"""Options that `offload run` and `offload generate` share: where weights live, and how tokens are chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from offload.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Running:
    """What both say of a model and how it generates; see their help."""

    model: str
    raw: bool = False
    max_new_tokens: int = 128
    cpu_memory: str | None = None
    gpu_memory: str | None = None
    resident: str | None = None
    device: str | None = None
    link: str | None = None
    dtype: str = "auto"
    sample: bool = False
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0
    ignore_eos: bool = False
    slots: int | None = None
    io: str = "threads"
    exact: bool = False
    strict: bool = False
    json: bool = False

    def check(self) -> None:
        """Refuses what makes no sense, before anything is read.

        Raises:
            UsageError: says which option, and why.
        """
        if self.slots is not None and self.slots < 1:
            raise UsageError(f"--slots {self.slots}: must be at least 1")
        if not self.sample and (self.temperature is not None or self.top_p is not None):
            raise UsageError("--temperature and --top-p need --sample")

    def placing(self) -> dict[str, Any]:
        """What `load` is told of memory, device and kernels."""
        names = ("cpu_memory", "gpu_memory", "resident", "device", "link", "dtype", "slots", "io", "exact", "strict")
        return {name: getattr(self, name) for name in names}

    def drawing(self) -> dict[str, Any]:
        """What sampling is told beyond the model's own configuration."""
        return {name: value for name in ("temperature", "top_p") if (value := getattr(self, name)) is not None}

    def choosing(self) -> dict[str, Any]:
        """What a transformers `generate` is told of choosing tokens."""
        if self.sample:
            return {"do_sample": True, **self.drawing()}
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
