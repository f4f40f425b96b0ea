"""Full fine-tuning with the optimizer's state on disk beside the same training in memory: seconds and bytes a step.

    python benchmarks/training.py --model DIR --offload-dir DIR                 # 2 x 256 tokens a step, 4 GiB
    python benchmarks/training.py --model DIR --offload-dir DIR --micro-batches 8

Systems run by turns, and medians are over all steps but the first two of each run. The bound is what the disk needs for
the bytes that moved, at the rate measured in the same loop with reads and writes at once; and the computing, measured
as the time of a step that is neither waiting nor updating.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

from report import RESULTS, hardware, machine_line, made_checkpoint, number, table, write
from runner import announce, last_line, run

from offload.hardware import versions
from offload.io.buffers import BufferPool
from offload.io.engine import Engine

Line = dict[str, Any]
WARM_UP = 2  # steps
TIMES_PLAIN, TIMES_DISK = 1.2, 1.15
MOST_WRITTEN = 14.5  # bytes a parameter
CHUNK = 24 << 20
SYSTEMS: dict[str, list[str]] = {
    "in memory, float32 states": ["--system", "plain"],
    "offload": ["--system", "offload"],
    "offload, no clipping": ["--system", "offload", "--clip", "0"],
}


def arguments() -> argparse.Namespace:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model", type=Path, help="checkpoint folder; default: a random one of 0.67B, made in scratch/")
    ap.add_argument("--offload-dir", type=Path, required=True, help="a folder on the disk to use")
    ap.add_argument("--cpu-memory", default="4GiB")
    ap.add_argument("--micro-batches", type=int, default=1)
    ap.add_argument("--steps", type=int, default=6, help="of each run, warming up included")
    ap.add_argument("--rounds", type=int, default=2)
    ap.add_argument("--limit", nargs="*", default=[], help="words before each of offload's commands: memlimit.sh 4G")
    ap.add_argument("--timeout", type=float, default=600, help="seconds per run")
    ap.add_argument("--out", type=Path, default=RESULTS)
    return ap.parse_args()


def disk_rate(folder: Path, seconds: float = 1.5) -> float:
    """Bytes a second of reads and writes together, as many of one as of the other, in shards as training moves them."""
    path, nbytes = folder / "rate.bin", 24 * CHUNK
    with Engine() as engine:
        with open(path, "wb") as made:
            os.posix_fallocate(made.fileno(), 0, 2 * nbytes)
        file = engine.open(path, writable=True)
        pool = BufferPool(8, CHUNK)
        for start in range(0, 2 * nbytes, CHUNK):  # written once, so that reads are of data
            with pool.lease() as lease:
                engine.write(file, start, lease.view).result()
        began, moved, at = time.perf_counter(), 0, 0
        flights: deque[Any] = deque()
        while time.perf_counter() - began < seconds or flights:
            while len(flights) < 8 and time.perf_counter() - began < seconds:
                lease, place = pool.lease(), (at // 2 * CHUNK) % nbytes
                future = (
                    engine.read(file, place, lease.view) if at % 2 else engine.write(file, nbytes + place, lease.view)
                )
                flights.append((lease, future))
                at += 1
            lease, future = flights.popleft()
            moved += future.result()
            lease.release()
        rate = moved / (time.perf_counter() - began)
        pool.close()
    path.unlink()
    return rate


def command(a: argparse.Namespace, model: Path, words: Sequence[str]) -> list[str]:
    found = [sys.executable, "benchmarks/train_steps.py", str(model), *words, "--steps", str(a.steps)]
    found += ["--micro-batches", str(a.micro_batches)]
    if "plain" in words:
        return found
    return [*a.limit, *found, "--cpu-memory", a.cpu_memory, "--offload-dir", str(a.offload_dir / "state")]


def steady(lines: Sequence[Line], key: str) -> float | None:
    """The median over the steps that count."""
    values = [value for line in lines for value in line.get(key, [])[WARM_UP:]]
    return median(values) if values else None


def summary(runs: dict[str, list[Line]], rates: Sequence[float]) -> tuple[dict[str, Any], list[list[str]]]:
    """Figures by system, and rows of the table."""
    rate, figures, rows = median(rates), {}, []
    for name, lines in runs.items():
        step = steady(lines, "step_s")
        if step is None:
            rows.append([name, "failed: " + "; ".join(sorted({last_line(line) for line in lines}))])
            continue
        read, written = steady(lines, "read_bytes"), steady(lines, "write_bytes")
        params = lines[0]["params"]
        disk_s = (read + written) / rate if read is not None and written is not None else None
        peak = max(line["peak_rss_bytes"] for line in lines)
        figures[name] = {
            "step_s": step,
            "disk_bound_s": disk_s,
            "waited_s": steady(lines, "waited_s"),
            "read_bytes": read,
            "write_bytes": written,
            "write_bytes_per_param": None if written is None else written / params,
            "peak_rss_bytes": peak,
        }
        rows.append(
            [
                name,
                number(step),
                number(disk_s),
                number(steady(lines, "waited_s")),
                number(read, scale=1e9),
                number(written, scale=1e9),
                number(figures[name]["write_bytes_per_param"]),
                number(peak, scale=2**30),
            ]
        )
    return figures, rows


def verdict(figures: dict[str, Any]) -> list[str]:
    """The figures to reach, and what was."""
    plain = figures.get("in memory, float32 states")
    lines = []
    for name, found in figures.items():
        if plain is None or found is plain:
            continue
        allowed = max(TIMES_PLAIN * plain["step_s"], TIMES_DISK * (found["disk_bound_s"] or 0))
        lines.append(
            f"- {name}: {found['step_s']:.2f} s a step; the larger of {TIMES_PLAIN} times in memory and {TIMES_DISK} "
            f"times the disk's bound is {allowed:.2f} s: {'reached' if found['step_s'] <= allowed else 'missed'}. "
            f"{found['write_bytes_per_param']:.1f} bytes a parameter written, of {MOST_WRITTEN}."
        )
    return lines


def main() -> None:
    a = arguments()
    model = a.model or made_checkpoint("0.7b")
    a.offload_dir.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[Line]] = {name: [] for name in SYSTEMS}
    rates = []
    for _ in range(a.rounds):
        rates.append(disk_rate(a.offload_dir))
        for name, words in SYSTEMS.items():
            line = run(command(a, model, words), timeout_s=a.timeout)
            announce(line, name)
            runs[name].append(line)
    figures, rows = summary(runs, rates)
    facts = hardware(a.offload_dir)
    header = ["", "s a step", "disk's bound", "waited", "GB read", "GB written", "B/param written", "peak GiB"]
    others = max(line["other_cpu_s"] / line["wall_s"] for lines in runs.values() for line in lines)
    text = "\n".join(
        [
            f"# Full fine-tuning, {date.today().isoformat()}",
            "",
            f"{machine_line(facts)}. {a.micro_batches} x 2 x 256 tokens a step, AdamW with float32 states, medians of "
            f"{a.rounds} rounds of {a.steps} steps, the first {WARM_UP} of each left out. Disk: "
            f"{median(rates) / 1e9:.2f} GB/s, reads and writes at once. Others used up to {others:.2f} cores.",
            "",
            table(header, rows),
            *verdict(figures),
            "",
        ]
    )
    result = {"figures": figures, "runs": runs, "disk_bytes_per_s": rates, "hardware": facts, "versions": versions()}
    paths = write(f"training-{a.micro_batches}x2x256", result, text, a.out)
    print(text, *paths, sep="\n")


if __name__ == "__main__":
    main()
