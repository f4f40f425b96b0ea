"""Says what this machine has, what it lacks for offload, and what to do about it.

    for finding in examine():
        print(finding.area, finding.status, finding.what)

Each check is a generator below; one that fails becomes a finding itself, so examine never raises.
"""

from __future__ import annotations

import os
import re
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from offload import hardware
from offload.units import GIB, MIB, format_bytes, format_rate

if TYPE_CHECKING:
    from rich.console import Console

SUPPORTED = {"python": ("3.11", "3.13"), "torch": ("2.11", "2.14"), "transformers": ("5.17", "5.24")}  # from, below
_SCRATCH_BYTES, _BLOCK, _READERS = 64 * MIB, 8 * MIB, 4

Status = Literal["ok", "warn", "missing"]


@dataclass(frozen=True)
class Finding:
    """One fact. "missing" is what some machines simply do not have; "warn" is what costs speed or may fail."""

    area: str
    status: Status
    what: str
    advice: str = ""  # empty when there is nothing to do


def examine(offload_dir: str | os.PathLike[str] | None = None) -> list[Finding]:
    """Every check's findings, in reading order. Writes and removes one scratch file of 64 MiB in `offload_dir`.

    Args:
        offload_dir: the folder whose disk is looked at; the current one when None.
    """
    where = os.fspath(offload_dir or os.getcwd())
    findings = []
    for area, check in _CHECKS.items():
        try:
            for found in check(where):
                findings.append(Finding(area, *found))
        except Exception as error:
            findings.append(Finding(area, "warn", f"could not be examined: {type(error).__name__}: {error}"))
    return findings


def render(findings: list[Finding], console: Console) -> None:
    """Prints findings as a table, the advice under its fact."""
    from rich.markup import escape
    from rich.table import Table

    marks = {"ok": "[green]ok[/]", "warn": "[yellow]warn[/]", "missing": "[dim]missing[/]"}
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    area = ""
    for finding in findings:
        text = escape(finding.what) + (f"\n[dim]→ {escape(finding.advice)}[/]" if finding.advice else "")
        table.add_row("" if finding.area == area else finding.area, marks[finding.status], text)
        area = finding.area
    console.print(table)


# The checks: each yields (status, what, advice) -----------------------------------------------------------------------

Found = tuple[Status, str, str] | tuple[Status, str]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _check_software(where: str) -> Iterator[Found]:
    installed = hardware.versions()
    for name, (lowest, below) in SUPPORTED.items():
        version = installed[name]
        if version is None:
            yield "missing", f"{name} is not installed", f"pip install '{name}>={lowest},<{below}'"
        elif _numbers(lowest) <= _numbers(version) < _numbers(below):
            yield "ok", f"{name} {version}"
        else:
            yield "warn", f"{name} {version}", f"tested with {lowest} and later, below {below}"


def _check_memory(where: str) -> Iterator[Found]:
    memory = hardware.host_memory()
    yield "ok", f"{format_bytes(memory.total)} of RAM, {format_bytes(memory.available)} available"
    if memory.limit is None:
        yield "ok", "no control group limits this process"
    else:
        left = "" if memory.limit_free is None else f", {format_bytes(memory.limit_free)} of it left"
        yield "ok", f"{memory.limit_source} limits it to {format_bytes(memory.limit)}{left}"
    budget, why = hardware.auto_cpu_budget(memory)
    if budget < 2 * GIB:
        yield "warn", f"automatic budget {why}", "end other programs: interpreter and torch alone take about 0.5 GiB"
    else:
        yield "ok", f"automatic budget {why}"


def _check_huge_pages(where: str) -> Iterator[Found]:
    setting = hardware.huge_pages()
    if setting in ("always", "madvise"):
        yield "ok", f"transparent huge pages: {setting}"
    else:
        advice = "as root: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"
        yield "warn", f"transparent huge pages: {setting}; reads may reach a third of the disk's rate", advice


def _check_locked_memory(where: str) -> Iterator[Found]:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        yield "ok", "RLIMIT_MEMLOCK: unlimited"
    else:
        yield "ok", f"RLIMIT_MEMLOCK: {format_bytes(soft)} (io_uring's registered buffers count against it)"


def _check_processor(where: str) -> Iterator[Found]:
    cpu = hardware.cpu_info()
    quota = "" if cpu.quota is None else f", a quota of {cpu.quota:g}"
    yield "ok", f"{cpu.model}, {cpu.cores} of {cpu.online} cores for this process{quota}"


def _check_kernels(where: str) -> Iterator[Found]:
    from offload import kernels

    for kind, answer in kernels.available().items():
        yield ("ok", kind) if answer == "yes" else ("missing", f"{kind}: {answer.removeprefix('no: ')}")


def _check_disk(where: str) -> Iterator[Found]:
    disk = hardware.disk_of(where)
    if str(disk.path) != os.path.abspath(where):
        yield "warn", f"there is no folder {where}; this is of {disk.path}, where it would be made"
    yield (
        "ok",
        f"{disk.filesystem} on {disk.mount} ({disk.source}), {format_bytes(disk.free)} of {disk.total // GIB} GiB free",
    )
    if disk.filesystem in ("tmpfs", "ramfs"):
        yield "warn", "this is memory, not a disk", "choose a folder on an NVMe disk as offload_dir"
    if disk.free < GIB:
        yield "warn", "too little room for a scratch file, so its rate was not measured"
        return
    try:
        direct, rate = _read_rate(str(disk.path))
    except OSError as error:
        yield "warn", f"a scratch file cannot be written in {disk.path}: {error}", "choose another offload_dir"
        return
    if direct:
        yield "ok", f"O_DIRECT works; about {format_rate(rate)} read (64 MiB: a glance, not a measurement)"
    else:
        advice = "reads will go through the page cache, which a memory limit counts; ext4 and xfs have O_DIRECT"
        yield "warn", f"O_DIRECT is refused here; about {format_rate(rate)} read", advice


def _read_rate(folder: str) -> tuple[bool, float]:
    """(does O_DIRECT work, bytes per second of reading a fresh file), by a few readers into huge pages."""
    import fcntl
    import mmap
    import tempfile
    from concurrent.futures import ThreadPoolExecutor

    buffer = mmap.mmap(-1, _SCRATCH_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them: _check_huge_pages says so
            buffer.madvise(mmap.MADV_HUGEPAGE)
    view = memoryview(buffer)
    try:
        view[:] = os.urandom(MIB) * (_SCRATCH_BYTES // MIB)  # touches every page; zeros might be stored as a hole
        with tempfile.TemporaryFile(dir=folder, prefix="offload-doctor-") as file, ThreadPoolExecutor(_READERS) as pool:
            fd = file.fileno()
            offsets = range(0, _SCRATCH_BYTES, _BLOCK)
            for offset in offsets:
                os.pwrite(fd, view[offset : offset + _BLOCK], offset)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # matters only if O_DIRECT is refused

            def read(offset: int) -> int:
                return os.preadv(fd, [view[offset : offset + _BLOCK]], offset)

            direct = True
            try:
                fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
                read(0)
            except OSError:
                direct = False
                fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)
            start = time.perf_counter()
            nbytes = sum(pool.map(read, offsets))
            return direct, nbytes / max(1e-9, time.perf_counter() - start)
    finally:
        view.release()
        buffer.close()


def _check_backends(where: str) -> Iterator[Found]:
    from offload.io import backends

    for name in backends.BACKENDS:
        if name != "fake":
            reason = backends.probe(name)
            yield ("ok", name) if reason is None else ("missing", f"{name}: {reason}")


def _check_gpu(where: str) -> Iterator[Found]:
    gpus, why_none = hardware.probe_gpus()
    if not gpus:
        yield "missing", f"{why_none}; models run on the CPU, or on --device emulated"
        return
    for gpu in gpus:
        yield "ok", f"{gpu.index}: {gpu.name}, {format_bytes(gpu.free)} of {format_bytes(gpu.total)} free"
        rate = gpu.link_bytes_per_s
        if rate is None:
            yield "ok", f"{gpu.index}: the driver names no PCIe link"
        else:
            slow = gpu.pcie_width is not None and gpu.pcie_width < 16
            yield (
                "warn" if slow else "ok",
                f"{gpu.index}: PCIe {gpu.pcie_gen} x{gpu.pcie_width}, at most {format_rate(rate)} a direction",
                "fewer than 16 lanes: another slot may be faster" if slow else "",
            )
    import torch  # only here, where there is a GPU to use: it takes a second

    if torch.cuda.is_available():
        yield "ok", f"torch uses CUDA {torch.version.cuda}"
    else:
        yield (
            "warn",
            f"torch {torch.__version__} cannot use the GPU",
            "install torch's CUDA build, and check the driver",
        )


def _check_hub(where: str) -> Iterator[Found]:
    offline = [name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if _is_set(os.environ.get(name, ""))]
    if offline:
        yield (
            "ok",
            f"offline ({' and '.join(offline)}): directories and what is cached can be run, nothing is downloaded",
        )
    else:
        yield "ok", "a hub id may be downloaded; HF_HUB_OFFLINE=1 forbids it"


def _is_set(value: str) -> bool:
    return value.strip().lower() in ("1", "true", "yes", "on")


_CHECKS: dict[str, Callable[[str], Iterator[Found]]] = {
    "software": _check_software,
    "memory": _check_memory,
    "huge pages": _check_huge_pages,
    "locked memory": _check_locked_memory,
    "processor": _check_processor,
    "kernels": _check_kernels,
    "disk": _check_disk,
    "I/O backends": _check_backends,
    "GPU": _check_gpu,
    "hub": _check_hub,
}
