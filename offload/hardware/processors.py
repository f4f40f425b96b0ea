"""Cores that this process may keep busy."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from offload.hardware.kernel import PROC, groups, text_of


@dataclass(frozen=True, kw_only=True)
class CpuInfo:
    model: str
    online: int  # cores of the machine
    cores: int  # cores this process may keep busy: affinity, and the control group's quota rounded down
    quota: float | None  # cores' worth of time that the tightest control group allows; None when unlimited


def _cpu_quotas(proc: Path) -> Iterator[float]:
    for _, folder in groups("cpu", proc):
        numbers = text_of(folder / "cpu.max").split() or [
            text_of(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")
        ]
        if len(numbers) == 2 and all(number.isdecimal() for number in numbers):  # not "max", not "-1"
            yield int(numbers[0]) / max(1, int(numbers[1]))


def cpu_info(proc: Path = PROC) -> CpuInfo:
    """The processor and how much of it is ours."""
    named = re.search(r"^model name\s*:\s*(.+)$", text_of(proc / "cpuinfo"), re.MULTILINE)
    online = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else online
    quota = min(_cpu_quotas(proc), default=None)
    return CpuInfo(
        model=named[1].strip() if named else platform.processor() or platform.machine(),
        online=online,
        cores=allowed if quota is None else max(1, min(allowed, int(quota))),
        quota=quota,
    )
