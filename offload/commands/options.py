"""Options that `offload run` and `offload generate` share: where weights live, and how tokens are chosen."""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

from offload.budgets import parse_resident, resolve
from offload.errors import UsageError
from offload.hardware import gpus
from offload.io.backends import probe
from offload.tiers.names import OWN, check_name, parse_link
from offload.units import parse_memory

DTYPES = ("auto", "bfloat16", "float16", "float32")


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
        if self.max_new_tokens < 1:
            raise UsageError(f"--max-new-tokens {self.max_new_tokens}: must be at least 1")
        if self.dtype not in DTYPES:
            raise UsageError(f"--dtype {self.dtype}: there are {', '.join(DTYPES)}")
        check_backend(self.io)
        if not self.sample and (self.temperature is not None or self.top_p is not None):
            raise UsageError("--temperature and --top-p need --sample")
        if self.temperature is not None and not 0 < self.temperature < inf:
            raise UsageError(f"--temperature {self.temperature}: above 0; leave out --sample for the likeliest token")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p {self.top_p}: above 0, and at most 1, which keeps all tokens")
        if self.device is not None:
            check_name(self.device)
        parse_link(self.link, self.device or OWN)
        here = self.device or (None if gpus() else "cpu")  # what a card can do is torch's to say
        if here in ("cpu", "emulated"):
            resolve(cpu_memory=self.cpu_memory, gpu_memory=self.gpu_memory, resident=self.resident, device=here)
            return
        for name in ("cpu_memory", "gpu_memory"):
            if (size := getattr(self, name)) is not None:
                parse_memory(size, name)
        parse_resident(self.resident)

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


def check_backend(name: str) -> None:
    """Whether the I/O backend can be used here.

    Raises:
        UsageError: it cannot, or there is none of that name.
    """
    if (reason := probe(name)) is not None:
        raise UsageError(f"--io {name} cannot be used here: {reason}; use --io threads")


def check_place(option: str, file: str | Path, *, replaces: bool = False) -> None:
    """Whether a file can be made there.

    Args:
        replaces: it is written beside the old one, whose name it takes.

    Raises:
        UsageError: there is no such folder, or it cannot be written.
    """
    path = Path(file)
    if not path.parent.is_dir():
        raise UsageError(f"{option} {path}: there is no folder {path.parent}; make it, or name another")
    if path.is_dir():
        raise UsageError(f"{option} {path} is a folder; name a file in it")
    if replaces and path.exists() and not path.is_file():
        raise UsageError(f"{option} {path} is no plain file, and would be replaced by one; name another")
    if not os.access(path if path.exists() and not replaces else path.parent, os.W_OK):
        raise UsageError(f"{option} {path} cannot be written; name another")


def check_folder(option: str, folder: str | Path) -> None:
    """Whether a folder is there, or can be made, and files in it.

    Raises:
        UsageError: a file is in the way, or it cannot be written.
    """
    path = Path(folder).absolute()
    there = next(p for p in (path, *path.parents) if p.exists())
    if not there.is_dir():
        raise UsageError(f"{option}={folder}: {there} is a file, where a folder is wanted; name another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"{option}={folder}: {there} cannot be written; name another")
