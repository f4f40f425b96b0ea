"""Main memory: what there is, what control groups allow, and what this process has."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from offload.hardware.kernel import PROC, SYS, groups, table_of, text_of
from offload.units import MIB, format_bytes

_NO_LIMIT = 1 << 60  # cgroup v1 writes "no limit" as the largest page count; anything this large means none


@dataclass(frozen=True, kw_only=True)
class HostMemory:
    """RAM at one moment, in bytes. The limit is that of the control group that leaves this process the least."""

    total: int  # the machine's RAM
    available: int  # what the machine can give without swapping
    limit: int | None  # the tightest control group's limit; None when no group limits this process
    limit_source: str  # "cgroup v1 /path", "cgroup v2 /path", or "machine"
    rss: int  # resident in this process now, libraries included
    limit_free: int | None = None  # what that group can still give: limit - usage + file cache it can drop
    rss_file: int = 0  # the part of rss that is mapped files; the figures above already count it as free


def _memory_level(folder: Path) -> tuple[int, int] | None:
    """(free, limit) of one group, in bytes, either version; None when it sets no limit."""
    names = ("memory.max", "memory.high", "memory.limit_in_bytes")  # "high" throttles long before "max" kills
    texts = (text_of(folder / name).strip() for name in names)
    limit = min((int(text) for text in texts if text.isdecimal()), default=_NO_LIMIT)
    if limit >= _NO_LIMIT:
        return None
    usage = text_of(folder / "memory.current") or text_of(folder / "memory.usage_in_bytes")
    stat = table_of(text_of(folder / "memory.stat"))
    prefix = "total_" if "total_inactive_file" in stat else ""  # v1: with the groups below
    cache = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("inactive", "active"))
    return max(0, min(limit, limit - int(usage or 0) + cache)), limit


def host_memory(proc: Path = PROC) -> HostMemory:
    """The machine's memory, and the limits that control groups (v1 and v2, every level) put on this process."""
    import psutil

    machine = psutil.virtual_memory()
    limits = ((name, _memory_level(folder)) for name, folder in groups("memory", proc))
    levels = [(level, name) for name, level in limits if level]
    (free, limit), source = min(levels, default=((None, None), "machine"))
    return HostMemory(
        total=int(machine.total),
        available=int(machine.available),
        limit=limit,
        limit_source=source,
        limit_free=free,
        rss=rss_bytes(proc),
        rss_file=_status_bytes("RssFile", proc),
    )


def auto_cpu_budget(memory: HostMemory) -> tuple[int, str]:
    """(bytes, sentence): what this process's peak RSS may reach when the user names no budget.

    What is free and what this process holds already, less a margin of 5 % and at least 512 MiB: others grow too, and
    the kernel needs pages for the I/O. Mapped files are in both, as cache and as ours, and count once.
    """
    own = max(0, memory.rss - memory.rss_file)
    free, source = memory.available, f"the machine: {format_bytes(memory.total)}"
    if memory.limit is not None:
        group_free = memory.limit_free if memory.limit_free is not None else max(0, memory.limit - memory.rss)
        if group_free < free:
            free, source = group_free, f"{memory.limit_source}: limit {format_bytes(memory.limit)}"
    margin = max(512 * MIB, (free + own) // 20)
    budget = max(0, free + own - margin)
    return budget, (
        f"{format_bytes(budget)} = {format_bytes(free)} free ({source}) + {format_bytes(own)} held already"
        f" - {format_bytes(margin)} margin"
    )


def _status_bytes(key: str, proc: Path) -> int:
    return int(table_of(text_of(proc / "self" / "status")).get(key, "0").split()[0]) * 1024


def rss_bytes(proc: Path = PROC) -> int:
    """Bytes resident in this process now: interpreter, libraries and mapped files included."""
    return _status_bytes("VmRSS", proc)


def peak_rss_bytes(proc: Path = PROC) -> int:
    """The largest rss_bytes since the process began, or since reset_peak_rss."""
    return _status_bytes("VmHWM", proc)


def reset_peak_rss(proc: Path = PROC) -> bool:
    """Starts peak_rss_bytes anew; False where the kernel does not allow it."""
    try:
        (proc / "self" / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def huge_pages(sys: Path = SYS) -> str:
    """Who gets transparent huge pages: "always", "madvise" (those that ask), "never" or "unknown"."""
    chosen = re.search(r"\[(\w+)\]", text_of(sys / "kernel/mm/transparent_hugepage/enabled"))
    return chosen[1] if chosen else "unknown"
