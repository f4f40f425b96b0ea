"""A few zeroth-order steps, or as many streamed forward passes, on one fixed batch: one JSON line.

python benchmarks/zeroth_steps.py MODEL --system zo --offload-dir DIR --cpu-memory 4GiB
python benchmarks/zeroth_steps.py MODEL --system forward --cpu-memory 4GiB     # what a step is compared with: twice
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from train_steps import batch

import offload
from offload.hardware import peak_rss_bytes


def zeroth(a: argparse.Namespace) -> dict[str, Any]:
    """Steps, and where their time went."""
    given, lines, began = batch(a), [], time.perf_counter()
    with offload.finetuning(
        a.model, method="zo", learning_rate=a.lr, cpu_memory=a.cpu_memory, offload_dir=a.offload_dir, overwrite=True,
        tokens=a.batch * a.length, zo_write_every=a.write_every,
    ) as trainer:  # fmt: skip
        ready_s = time.perf_counter() - began
        for _ in range(a.steps):
            trainer.training.timeline.reset()
            result = trainer.step([given] * a.micro_batches)
            totals = trainer.training.timeline.totals()
            lines.append((result, totals))
        began = time.perf_counter()
        trainer.commit()
        commit_s = time.perf_counter() - began
    shutil.rmtree(a.offload_dir)
    return {
        "step_s": [r.step_s for r, _ in lines],
        "loss": [r.loss for r, _ in lines],
        "read_bytes": [r.read_bytes for r, _ in lines],
        "write_bytes": [r.write_bytes for r, _ in lines],
        "waited_read_s": [t.stall_s.get("compute:read", 0.0) for _, t in lines],
        "waited_write_s": [t.stall_s.get("compute:write", 0.0) for _, t in lines],
        "move_s": [t.busy_s.get("move", 0.0) for _, t in lines],
        "ready_s": ready_s,
        "commit_s": commit_s,
    }


def forward(a: argparse.Namespace) -> dict[str, Any]:
    """Forward passes with a loss, by the inference engine with torch's own ops."""
    given, seconds, losses, read = batch(a), [], [], []
    handle = offload.load(a.model, cpu_memory=a.cpu_memory, batch=a.batch, context=a.length, exact=True)
    with handle as model, torch.no_grad():
        for _ in range(a.steps):
            began, before = time.perf_counter(), handle.session.statistics()
            total = sum(float(model(**given, use_cache=False).loss) for _ in range(a.micro_batches))
            seconds.append(time.perf_counter() - began)
            read.append(handle.session.statistics().read_bytes - before.read_bytes)
            losses.append(total / a.micro_batches)
    return {"step_s": seconds, "loss": losses, "read_bytes": read}


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("model", type=Path)
    ap.add_argument("--system", choices=("zo", "forward"), default="zo")
    ap.add_argument("--batch", type=int, default=2)
    ap.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    ap.add_argument("--micro-batches", type=int, default=1, help="of a step")
    ap.add_argument("--steps", type=int, default=3)
    ap.add_argument("--lr", type=float, default=1e-6)
    ap.add_argument("--write-every", type=int, help="default: as it pays")
    ap.add_argument("--cpu-memory", default="4GiB")
    ap.add_argument("--offload-dir", type=Path, help="a new folder for the log; removed at the end")
    a = ap.parse_args()
    found = forward(a) if a.system == "forward" else zeroth(a)
    print(json.dumps(found | {"system": a.system, "peak_rss_bytes": peak_rss_bytes()}))


if __name__ == "__main__":
    main()
