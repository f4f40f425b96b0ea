"""How much of the disk the I/O engine reaches: `python benchmarks/engine_io.py FILE [--json OUT]`.

The ceiling is written out here, without the engine: threads that call preadv on an O_DIRECT descriptor, each into huge
pages of its own. Ceilings, fio where it is installed, and the engine with every usable backend take turns in rounds,
because a shared disk drifts; the figures are medians, beside the cores that other processes kept busy: where that is
much, the ratios say little. FILE should have a GB or more and is only read.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import mmap
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

if __package__ in (None, ""):  # run as a script, from a checkout
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from rich.console import Console
from rich.table import Table

from offload.io.backends import BACKENDS, probe
from offload.io.buffers import BufferPool
from offload.io.engine import Engine
from offload.units import MIB

REQUEST_NBYTES = 128 * MIB  # about a layer
GOAL_FRACTION, GOAL_CPU_S_PER_GB = 0.95, 0.05


@dataclass(frozen=True, slots=True)
class Sample:
    """One run: bytes per second, this process's CPU seconds per 1e9 bytes, and the cores that others kept busy."""

    bytes_per_s: float
    cpu_s_per_gb: float
    other_cores: float


def ceiling(path: str, nbytes: int, threads: int, block_nbytes: int) -> Sample:
    """Plain threads and preadv."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    buffers = [mmap.mmap(-1, 2 * block_nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(threads)]
    offsets = itertools.count(0, block_nbytes)

    def work(buffer: mmap.mmap) -> None:
        view = memoryview(buffer)[:block_nbytes]
        while (offset := next(offsets)) + block_nbytes <= nbytes:
            assert os.preadv(fd, [view], offset) == block_nbytes

    for buffer in buffers:
        buffer.madvise(mmap.MADV_HUGEPAGE)
        memoryview(buffer)[:: mmap.PAGESIZE] = bytes(len(buffer) // mmap.PAGESIZE)
    workers = [threading.Thread(target=work, args=(buffer,)) for buffer in buffers]
    sample = _measure(nbytes // block_nbytes * block_nbytes, lambda: _run_all(workers))
    os.close(fd)
    return sample


def engine(path: str, nbytes: int, backend: str, threads: int, block_nbytes: int, request_nbytes: int) -> Sample:
    """The engine as the runtime uses it: a ring of slots, requests of many blocks, waited for in order."""
    with Engine(backend, threads=threads, block_nbytes=block_nbytes) as disk:
        file = disk.open(path)
        pool = BufferPool(4, request_nbytes)
        memory = pool.buffer.view
        memory[:: mmap.PAGESIZE] = bytes(len(memory) // mmap.PAGESIZE)

        def read_all() -> None:
            flying: deque = deque()
            for offset in range(0, nbytes // request_nbytes * request_nbytes, request_nbytes):
                if len(flying) == 4:
                    lease, future = flying.popleft()
                    future.result()
                    lease.release()
                lease = pool.lease()
                flying.append((lease, disk.read(file, offset, lease.view)))
            for lease, future in flying:
                future.result()
                lease.release()

        sample = _measure(nbytes // request_nbytes * request_nbytes, read_all)
        disk.check_integrity()
    pool.close()
    return sample


def fio(path: str, nbytes: int) -> Sample:
    """fio's asynchronous reads: 8 MiB blocks, 8 in flight; its own CPU time."""
    options = {
        "name": "read", "filename": path, "rw": "read", "direct": 1, "bs": "8M", "iodepth": 8, "ioengine": "libaio",
        "size": nbytes // (8 * MIB) * 8 * MIB, "readonly": None, "output-format": "json", "iomem": "mmap",
    }  # fmt: skip
    command = ["fio"] + [f"--{key}" if value is None else f"--{key}={value}" for key, value in options.items()]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["jobs"][0]
    rate = float(found["read"]["bw_bytes"])
    return Sample(rate, (found["usr_cpu"] + found["sys_cpu"]) / 100 / (rate / 1e9), math.nan)


def _run_all(workers: list[threading.Thread]) -> None:
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def _measure(nbytes: int, work: Callable[[], None]) -> Sample:
    began, cpu, machine = time.perf_counter(), _cpu_s(), _machine_cpu_s()
    work()
    passed_s, cpu_s, machine_s = time.perf_counter() - began, _cpu_s() - cpu, _machine_cpu_s() - machine
    return Sample(nbytes / passed_s, cpu_s / (nbytes / 1e9), max(0.0, machine_s - cpu_s) / passed_s)


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _machine_cpu_s() -> float:
    """Busy seconds of all cores since boot: user, nice, system, interrupts; neither idle nor waiting for a disk."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    return (sum(fields[:8]) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def _contenders(path: str, nbytes: int) -> dict[str, Callable[[], Sample]]:
    found: dict[str, Callable[[], Sample]] = {}
    for threads, block in ((8, 8), (16, 4), (4, 16)):
        found[f"ceiling {threads} x {block} MiB"] = partial(ceiling, path, nbytes, threads, block * MIB)
    if shutil.which("fio"):
        found["fio libaio 8 x 8 MiB"] = partial(fio, path, nbytes)
    for backend in BACKENDS:
        if backend != "fake" and probe(backend) is None:
            found[f"engine {backend} 8 x 4 MiB"] = partial(engine, path, nbytes, backend, 8, 4 * MIB, REQUEST_NBYTES)
    return found


def _report(samples: dict[str, list[Sample]]) -> list[dict[str, object]]:
    rates = {name: statistics.median(s.bytes_per_s for s in found) for name, found in samples.items()}
    costs = {name: statistics.median(s.cpu_s_per_gb for s in found) for name, found in samples.items()}
    others = {name: statistics.median(s.other_cores for s in found) for name, found in samples.items()}
    best = max((name for name in rates if name.startswith("ceiling")), key=rates.__getitem__)
    rows: list[dict[str, object]] = []
    for name, rate in rates.items():
        # Within a round the disk is about the same, so the ratio is taken there and then its median.
        ratio = statistics.median(
            mine.bytes_per_s / its.bytes_per_s for mine, its in zip(samples[name], samples[best], strict=True)
        )
        row = {"name": name, "bytes_per_s": rate, "cpu_s_per_gb": costs[name], "ratio": ratio}
        row["other_cores"] = None if math.isnan(others[name]) else others[name]
        if name.startswith("engine"):
            row["reaches_goal"] = ratio >= GOAL_FRACTION and costs[name] - costs[best] <= GOAL_CPU_S_PER_GB
        rows.append(row | {"samples": [_plain(sample) for sample in samples[name]]})
    return rows


def _plain(sample: Sample) -> dict[str, float | None]:
    return {key: None if math.isnan(value) else value for key, value in asdict(sample).items()}


def _print(rows: list[dict[str, object]], console: Console) -> None:
    table = Table("reader", "GB/s", "CPU s/GB", "of ceiling", "other cores", "goal")
    for row in rows:
        goal = {True: "reached", False: "missed"}.get(row.get("reaches_goal"), "")
        figures = f"{row['bytes_per_s'] / 1e9:.2f}", f"{row['cpu_s_per_gb']:.4f}", f"{row['ratio']:.3f}"
        others = "" if row["other_cores"] is None else f"{row['other_cores']:.2f}"
        table.add_row(str(row["name"]), *figures, others, goal)
    console.print(table)


def _hardware() -> dict[str, object]:
    system = os.uname()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), system.machine)
    return {
        "system": system.sysname, "kernel": system.release, "machine": system.machine, "cpu": model,
        "cores": os.cpu_count(), "python": platform.python_version(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
    }  # fmt: skip


def main() -> None:
    """Measure, print, and perhaps save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", help="a large file, which is only read")
    parser.add_argument("--json", metavar="OUT", help="save every sample there")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--gigabytes", type=float, default=1.5, help="read per run, from the start of the file")
    options = parser.parse_args()
    nbytes = min(os.path.getsize(options.file), int(options.gigabytes * 1e9))
    if nbytes < 4 * REQUEST_NBYTES:
        parser.error(f"{options.file} has {nbytes:,} bytes to read; at least {4 * REQUEST_NBYTES:,} tell something")
    contenders = _contenders(options.file, nbytes)
    samples: dict[str, list[Sample]] = {name: [] for name in contenders}
    console, began = Console(), datetime.datetime.now(datetime.UTC)
    for round_number in range(options.rounds + 1):
        names = list(contenders)
        turn = round_number % len(names)
        for name in names[turn:] + names[:turn]:  # nobody always follows the same neighbour
            sample = contenders[name]()
            if round_number:  # the first round warms up
                samples[name].append(sample)
    rows = _report(samples)
    console.print(f"{options.rounds} rounds of {nbytes / 1e9:.2f} GB, medians; ratio taken within each round")
    _print(rows, console)
    if options.json:
        result = {
            "date": began.isoformat(timespec="seconds"), "hardware": _hardware(), "rounds": options.rounds,
            "bytes_per_run": nbytes, "goal": {"ratio": GOAL_FRACTION, "cpu_s_per_gb_above": GOAL_CPU_S_PER_GB},
            "results": rows,
        }  # fmt: skip
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
