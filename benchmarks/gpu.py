"""What waits for a machine with a GPU, in under eight minutes: GPU tests, link rates, decode on a card that is small.

    python benchmarks/gpu.py --model DIR        # a checkpoint of several gigabytes; default: a random one is made
    python benchmarks/gpu.py --dry-run          # what it would do, on any machine

The card is made small: every process may allocate a quarter of the model there, as torch enforces it. With weights in
main memory, then on disk, each with prefetch (two slots) and without (one); beside accelerate's offload on the same
card; checked against plain transformers with the whole model on the GPU. Jobs are in order of importance, and what
does not fit in --minutes is listed as not run.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from gpu_links import LINK_BYTES, links
from gpu_tables import page, summary
from report import RESULTS, ROOT, SCRATCH, checkpoint_bytes, hardware, largest_shard, made_checkpoint, write
from runner import announce, run

from offload.hardware import disk_of, probe_gpus, versions

SHARE = 4  # the model is so many times the card
MODEL_BYTES = {"3b": 6.1e9, "1b": 2.6e9}  # what the sizes of a random checkpoint take on disk
# Runs `offload` in a process whose torch may allocate so many bytes on the GPU.
CAPPED = """import sys, torch
torch.cuda.set_per_process_memory_fraction(min(1.0, int(sys.argv[1]) / torch.cuda.mem_get_info()[1]))
from offload.cli import main
main(sys.argv[2:])"""


@dataclass(frozen=True)
class Job:
    """One decode. `expected_s` is what it should take, and must be left for it to start."""

    name: str
    batch: int
    command: list[str]
    expected_s: float = 30.0


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model", type=Path, help="checkpoint folder; default: a random 3B, smaller on a small disk")
    ap.add_argument("--batches", default="1,32")
    ap.add_argument("--prompt", type=int, default=32, help="prompt tokens: the ids from 3 on")
    ap.add_argument("--new", type=int, default=16)
    ap.add_argument("--minutes", type=float, default=7.5, help="for everything")
    ap.add_argument("--card", type=int, help=f"bytes of the small card; default: the checkpoint's over {SHARE}")
    ap.add_argument("--peer-scripts", type=Path, help="folder with disk_limit.py, for the disk's ceiling")
    ap.add_argument("--skip-tests", action="store_true")
    ap.add_argument("--out", type=Path, default=RESULTS)
    ap.add_argument("--dry-run", action="store_true")
    return ap.parse_args(argv)


def largest_size(free_bytes: float) -> str:
    """The largest random checkpoint that leaves a tenth of the free disk alone."""
    fitting = [size for size, nbytes in MODEL_BYTES.items() if nbytes <= 0.9 * free_bytes]
    if not fitting:
        raise SystemExit(f"{free_bytes / 1e6:.0f} MB of disk are free, too little for a checkpoint; name one: --model")
    return fitting[0]


def decode_jobs(model: Path, card: int, batches: Sequence[int], prompt: int, new: int) -> list[Job]:
    """Every decode, the most important first: batch by batch."""
    found = []
    worker = [sys.executable, str(ROOT / "benchmarks" / "peer_accelerate.py"), str(model), "--device", "cuda"]
    for batch in batches:
        sizes = ["--batch", str(batch), "--prompt", str(prompt), "--new", str(new)]
        small = ["--gpu-memory", str(card)]
        plain = [*worker, *sizes]
        own = [sys.executable, "-c", CAPPED, str(card), "run", str(model), "--device", "cuda", *small, "--json"]
        own += ["--prompt-ids", ",".join(str(k) for k in range(3, 3 + prompt)), "--max-new-tokens", str(new)]
        own += ["--batch", str(batch), "--ignore-eos"]
        streamed = [*own, "--cpu-share", "0"]
        disk = ["--resident", "0.25"]  # what the card holds and no more: main memory keeps no weights
        found += [
            Job("transformers, all on the GPU", batch, [*plain, "--place", "resident"]),
            Job("offload, host, prefetch", batch, [*streamed, "--slots", "2"]),
            Job("accelerate, host", batch, [*plain, "--place", "host", *small]),
            Job("offload, host, split between GPU and CPU", batch, [*own, "--slots", "2"]),
            Job("offload, host, linears on the CPU", batch, [*own, "--slots", "2", "--cpu-share", "1"]),
            Job("offload, host, no prefetch", batch, [*streamed, "--slots", "1"]),
            Job("offload, disk, prefetch", batch, [*streamed, *disk, "--slots", "2"], 45.0),
            Job("offload, disk, no prefetch", batch, [*streamed, *disk, "--slots", "1"], 60.0),
            Job("accelerate, disk", batch, [*plain, "--place", "disk", *small], 90.0),
        ]
    return found


def measure(jobs: Sequence[Job], deadline: float) -> list[dict[str, Any]]:
    """A line for each job. One that is not expected to end by the deadline is not begun; one that does not is ended."""
    lines = []
    for job in jobs:
        left = deadline - time.monotonic()
        facts: dict[str, Any] = {"job": job.name, "batch": job.batch}
        if left < job.expected_s:
            lines.append(facts | {"exit": None, "error": f"not run: {max(0.0, left):.0f} s were left"})
            print(f"{job.name}, batch {job.batch}: not run, {max(0.0, left):.0f} s were left", flush=True)
            continue
        line = run(job.command, timeout_s=left)
        announce(line, f"{job.name}, batch {job.batch}")
        lines.append(line | facts)
    return lines


def main() -> int:
    a = arguments()
    deadline = time.monotonic() + 60 * a.minutes
    found, why = probe_gpus()
    size = None if a.model else largest_size(disk_of(SCRATCH).free)
    if a.dry_run:
        return rehearse(a, size, why)
    if not found:
        raise SystemExit(f"there is no GPU here: {why}. --dry-run prints what would be measured.")
    model = (a.model or made_checkpoint(size or "3b")).absolute()
    nbytes = checkpoint_bytes(model)
    card = a.card or nbytes // SHARE
    tests: dict[str, Any] = {"output": "skipped"}
    if not a.skip_tests:
        tests = run([sys.executable, "-m", "pytest", "-m", "gpu", "tests"], timeout_s=240, wants_json=False)
        print(tests["output"].strip().splitlines()[-1:], flush=True)
    rates = links()
    disk: dict[str, Any] = {}
    if a.peer_scripts:
        script = str(a.peer_scripts.absolute() / "disk_limit.py")
        disk = run([sys.executable, script, str(largest_shard(model)), "--quick"], timeout_s=60)
    batches = [int(part) for part in a.batches.split(",")]
    lines = measure(decode_jobs(model, card, batches, a.prompt, a.new), deadline)
    result = {
        "date": date.today().isoformat(),
        "hardware": hardware(model),
        "versions": versions(),
        "model": model.name,
        "model_bytes": nbytes,
        "card_bytes": card,
        "asked": {"prompt": a.prompt, "new": a.new, "batches": batches},
        "tests": tests,
        "links": rates,
        "disk_bytes_per_s": disk.get("mean_read_bytes_per_s"),
        "lines": lines,
    }
    result["summary"] = summary(lines, rates, result["disk_bytes_per_s"])
    text = page(result)
    paths = write("decode-gpu", result, text, a.out)
    print(f"\n{text}\n{paths[0]}\n{paths[1]}")
    return int(bool(tests.get("exit")) or any(line["exit"] for line in lines))


def rehearse(a: argparse.Namespace, size: str | None, why: str) -> int:
    """Prints what would be done."""
    model = a.model.absolute() if a.model else SCRATCH / f"random-{size}"
    nbytes = checkpoint_bytes(model) if model.is_dir() else int(MODEL_BYTES[size or "3b"])
    card = a.card or nbytes // SHARE
    print(f"GPU: {why or 'there is one'}")
    note = "" if model.is_dir() else ", to be made"
    print(f"model: {model.name}, {nbytes / 1e9:.2f} GB{note}; card {card / 1e9:.2f} GB")
    print("tests: " + ("skipped" if a.skip_tests else "pytest -m gpu tests, at most 240 s"))
    print(f"links: pinned and pageable copies of {', '.join(f'{n:,}' for n in LINK_BYTES)} bytes")
    print("disk: " + ("disk_limit.py --quick" if a.peer_scripts else "offload's own measurement (no --peer-scripts)"))
    for job in decode_jobs(model, card, [int(part) for part in a.batches.split(",")], a.prompt, a.new):
        words = ["<capped>" if word == CAPPED else word for word in job.command]
        print(f"{job.name}, batch {job.batch} (about {job.expected_s:.0f} s): {' '.join(words)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
