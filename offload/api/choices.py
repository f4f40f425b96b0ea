"""What `load` and `wrap` settle in the same way: the device and its link, kernels, and what the CPU multiplies by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from offload.budgets import Size, from_max_memory, resolve
from offload.errors import UsageError
from offload.kernels.chosen import Kernels
from offload.processors import choose_share
from offload.profile import load_profile
from offload.runtime.discovery import Anatomy
from offload.runtime.warmup import compile_kernels
from offload.specs import Budgets
from offload.tiers.layout import Source


def check_counts(**given: int | None) -> None:
    """Numbers of things, of which there is at least one; None: nobody says.

    Raises:
        UsageError: says which is less.
    """
    for name, count in given.items():
        if count is not None and count < 1:
            raise UsageError(f"{name}={count}: must be at least 1")


def budgets_for(
    device: str, cpu_memory: Size, gpu_memory: Size, resident: Size, max_memory: Mapping[Any, Size] | None
) -> Budgets:
    """What may be used of each memory; transformers' `max_memory` says what the other two do not.

    Raises:
        BudgetError, UsageError: see `offload.budgets.resolve`.
    """
    if max_memory is not None:
        sizes = from_max_memory(max_memory)
        cpu_memory = cpu_memory if cpu_memory is not None else sizes.get("cpu_memory")
        gpu_memory = gpu_memory if gpu_memory is not None else sizes.get("gpu_memory")
    return resolve(cpu_memory=cpu_memory, gpu_memory=gpu_memory, resident=resident, device=device)


def ready_kernels(device: str, sources: Iterable[Source], anatomy: Anatomy, exact: bool) -> Kernels:
    """What computes, ready to run."""
    kernels = Kernels("cuda" if device.startswith("cuda") else "cpu", exact=exact)
    compile_kernels(kernels, sources, has_transposed=bool(anatomy.transposed))
    return kernels


def share_for(
    asked: float | str | None,
    anatomy: Anatomy,
    sources: Mapping[str, Source],
    budgets: Budgets,
    rows: int,
    device: str,
    exact: bool,
    link: float | None,
    directory: Path | None,
) -> tuple[float, Kernels]:
    """What the CPU multiplies by beside an accelerator, and by which kernels."""
    kernels = Kernels("cpu", exact=exact)
    matrices = [sources[name] for name in sorted(anatomy.linears)]
    if device != "cpu" and not exact:
        compile_kernels(kernels, matrices)
    fits = sum(s.nbytes for s in sources.values()) <= (budgets.gpu_memory or 0)
    share = choose_share(
        asked,
        matrices,
        rows,
        kernels,
        fits=fits,
        device=device,
        exact=exact,
        link_bytes_per_s=link,
        profile=load_profile(directory) if device != "cpu" else None,
    )
    return share, kernels
