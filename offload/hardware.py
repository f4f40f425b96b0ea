"""What this machine has, as facts: memory and the limits on it, cores, GPUs, disks. Nothing is measured here.

No torch; psutil and NVML are imported by the functions that need them. Functions that read /proc or /sys take the
place to read as an argument, so that a test can show them a machine that is not there. What cannot be known is None
or "unknown", never an exception.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from offload.units import GIB, MIB, format_bytes

PROC, SYS = Path("/proc"), Path("/sys")
_NO_LIMIT = 1 << 60  # cgroup v1 writes "no limit" as the largest page count; anything this large means none


# Memory ---------------------------------------------------------------------------------------------------------------


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


@dataclass(frozen=True)
class _Mount:
    root: PurePosixPath  # the folder of the filesystem that is mounted
    point: Path
    device: str  # "major:minor"
    filesystem: str
    source: str
    options: tuple[str, ...]


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _table(text: str) -> dict[str, str]:
    """Lines of "name value" or "name: value"."""
    pairs = (line.replace(":", " ", 1).split(None, 1) for line in text.splitlines())
    return {pair[0]: pair[1].strip() for pair in pairs if len(pair) == 2}


def _mounts(proc: Path) -> list[_Mount]:
    found = []
    for line in _text(proc / "self" / "mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        fields, rest = left.split(), right.split()
        if len(fields) < 6 or len(rest) < 2:
            continue
        root, point = (re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), field) for field in fields[3:5])
        options = tuple(rest[2].split(",")) if len(rest) > 2 else ()
        found.append(_Mount(PurePosixPath(root), Path(point), fields[2], rest[0], rest[1], options))
    return found


def _groups(controller: str, proc: Path) -> Iterator[tuple[str, Path]]:
    """("cgroup v2 /path", folder) of every group that can limit this process, from its own up to the root.

    A container may see only part of the hierarchy: a path that lies outside what is mounted starts at the mount.
    """
    mounts = _mounts(proc)
    for line in _text(proc / "self" / "cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        for mount in mounts:
            if mount.filesystem != ("cgroup" if controllers else "cgroup2"):
                continue
            if controllers and controller not in mount.options:
                continue
            try:
                inside = PurePosixPath(path).relative_to(mount.root)
            except ValueError:
                inside = PurePosixPath()
            if ".." in inside.parts:
                inside = PurePosixPath()
            for level in (inside, *inside.parents):
                yield f"cgroup v{1 if controllers else 2} {mount.root / level}", mount.point / level
            break


def _memory_level(folder: Path) -> tuple[int, int] | None:
    """(free, limit) of one group, in bytes, either version; None when it sets no limit."""
    names = ("memory.max", "memory.high", "memory.limit_in_bytes")  # "high" throttles long before "max" kills
    texts = (_text(folder / name).strip() for name in names)
    limit = min((int(text) for text in texts if text.isdecimal()), default=_NO_LIMIT)
    if limit >= _NO_LIMIT:
        return None
    usage = _text(folder / "memory.current") or _text(folder / "memory.usage_in_bytes")
    stat = _table(_text(folder / "memory.stat"))
    prefix = "total_" if "total_inactive_file" in stat else ""  # v1: with the groups below
    cache = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("inactive", "active"))
    return max(0, min(limit, limit - int(usage or 0) + cache)), limit


def host_memory(proc: Path = PROC) -> HostMemory:
    """The machine's memory, and the limits that control groups (v1 and v2, every level) put on this process."""
    import psutil

    machine = psutil.virtual_memory()
    limits = ((name, _memory_level(folder)) for name, folder in _groups("memory", proc))
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
    return int(_table(_text(proc / "self" / "status")).get(key, "0").split()[0]) * 1024


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
    chosen = re.search(r"\[(\w+)\]", _text(sys / "kernel/mm/transparent_hugepage/enabled"))
    return chosen[1] if chosen else "unknown"


# Processors -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CpuInfo:
    model: str
    online: int  # cores of the machine
    cores: int  # cores this process may keep busy: affinity, and the control group's quota rounded down
    quota: float | None  # cores' worth of time that the tightest control group allows; None when unlimited


def _cpu_quotas(proc: Path) -> Iterator[float]:
    for _, folder in _groups("cpu", proc):
        numbers = _text(folder / "cpu.max").split() or [
            _text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")
        ]
        if len(numbers) == 2 and all(number.isdecimal() for number in numbers):  # not "max", not "-1"
            yield int(numbers[0]) / max(1, int(numbers[1]))


def cpu_info(proc: Path = PROC) -> CpuInfo:
    """The processor and how much of it is ours."""
    named = re.search(r"^model name\s*:\s*(.+)$", _text(proc / "cpuinfo"), re.MULTILINE)
    online = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else online
    quota = min(_cpu_quotas(proc), default=None)
    return CpuInfo(
        model=named[1].strip() if named else platform.processor() or platform.machine(),
        online=online,
        cores=allowed if quota is None else max(1, min(allowed, int(quota))),
        quota=quota,
    )


@dataclass(frozen=True, kw_only=True)
class GpuInfo:
    index: int  # among the visible ones, in PCI order: CUDA's number where all cards are alike
    name: str
    total: int  # bytes
    free: int  # bytes, at the time of asking
    uuid: str  # with this a card is found again whatever the order
    pcie_gen: int | None  # the fastest that card and slot agree on
    pcie_width: int | None  # lanes in use

    @property
    def link_bytes_per_s(self) -> float | None:
        """What the PCIe link can carry in one direction, before protocol overhead; None when unknown."""
        if not self.pcie_gen or not self.pcie_width:
            return None
        return {1: 0.25e9, 2: 0.5e9}.get(self.pcie_gen, 0.985e9 * 2.0 ** (self.pcie_gen - 3)) * self.pcie_width


def gpus() -> list[GpuInfo]:
    """The NVIDIA GPUs that this process may use; see probe_gpus for the reason when there are none."""
    return probe_gpus()[0]


def probe_gpus() -> tuple[list[GpuInfo], str]:
    """(GPUs, reason): those that the driver shows and CUDA_VISIBLE_DEVICES leaves; why, when there are none."""
    try:
        import pynvml
    except ImportError:
        return [], "nvidia-ml-py is not installed, so GPUs cannot be asked for"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return [], f"no NVIDIA driver answers ({error})"
    try:
        found = [_gpu(pynvml, index, handle) for index, handle in enumerate(_visible_gpus(pynvml))]
    except pynvml.NVMLError as error:
        return [], f"the NVIDIA driver refused ({error})"
    finally:
        pynvml.nvmlShutdown()
    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    why = "the driver shows no GPU" if asked is None else f"CUDA_VISIBLE_DEVICES={asked!r} leaves none"
    return found, "" if found else why


def _visible_gpus(nvml: Any) -> Iterator[Any]:
    """Handles, in the order of CUDA_VISIBLE_DEVICES; like CUDA, stops at the first entry that names no GPU."""
    count = nvml.nvmlDeviceGetCount()
    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    for name in map(str, range(count)) if asked is None else map(str.strip, asked.split(",")):
        if name.isdecimal() and int(name) < count:
            yield nvml.nvmlDeviceGetHandleByIndex(int(name))
        elif name.startswith(("GPU-", "MIG-")):
            try:
                yield nvml.nvmlDeviceGetHandleByUUID(name)
            except nvml.NVMLError:
                return
        else:
            return


def _gpu(nvml: Any, index: int, handle: Any) -> GpuInfo:
    def link(ask: Any) -> int | None:
        try:
            return int(ask(handle))
        except nvml.NVMLError:  # a slice of a card has no link of its own
            return None

    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    return GpuInfo(
        index=index,
        name=str(nvml.nvmlDeviceGetName(handle)),
        total=int(memory.total),
        free=int(memory.free),
        uuid=str(nvml.nvmlDeviceGetUUID(handle)),
        pcie_gen=link(nvml.nvmlDeviceGetMaxPcieLinkGeneration),
        pcie_width=link(nvml.nvmlDeviceGetCurrPcieLinkWidth),
    )


# Disks ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DiskFacts:
    path: Path  # what was asked about, or the nearest folder above it that exists
    mount: str  # where its filesystem is mounted
    device: str  # "major:minor" as stat gives it; two paths with the same one share a disk
    filesystem: str  # "ext4", "xfs", "overlay", "tmpfs", ...
    source: str  # what is mounted, often "/dev/..."
    total: int  # bytes
    free: int  # bytes this user may still write
    rotational: bool | None  # None where the kernel does not say


def disk_of(path: str | os.PathLike[str], *, proc: Path = PROC, sys: Path = SYS) -> DiskFacts:
    """The filesystem that holds `path`, or would hold it."""
    here = Path(path).absolute()
    while not here.exists():
        here = here.parent
    number = here.stat().st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    above = [mount for mount in _mounts(proc) if here.resolve().is_relative_to(mount.point)]
    above = [mount for mount in above if mount.device == device] or above  # some filesystems number themselves anew
    mount = max(above, key=lambda mount: len(mount.point.parts), default=None)
    block = sys / "dev" / "block" / (mount.device if mount else device)
    spins = _text(block / "queue" / "rotational") or _text(block.resolve().parent / "queue" / "rotational")
    space = os.statvfs(here)
    return DiskFacts(
        path=here,
        mount=str(mount.point) if mount else "unknown",
        device=device,
        filesystem=mount.filesystem if mount else "unknown",
        source=mount.source if mount else "unknown",
        total=space.f_blocks * space.f_frsize,
        free=space.f_bavail * space.f_frsize,
        rotational=spins.strip() == "1" if spins.strip() else None,
    )


# Names for caches and reports -----------------------------------------------------------------------------------------


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
