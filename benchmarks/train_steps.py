"""A few training steps on one fixed batch, by offload, a plain loop in memory, or forward passes alone: a JSON line.

    python benchmarks/train_steps.py MODEL --system offload --offload-dir DIR --cpu-memory 4GiB
    python benchmarks/train_steps.py MODEL --method zo --lr 1e-6 --offload-dir DIR    # or lora: weights that stream
    python benchmarks/train_steps.py MODEL --system forward          # what a zeroth-order step is compared with: twice
    python benchmarks/train_steps.py MODEL --system plain            # float32 weights and moments under bf16 autocast

Both clip the gradient's norm to 1 unless told otherwise, use AdamW without weight decay, and compute blocks again in
the backward pass where memory wants it (plain: always). The first two steps warm up, and are not to be counted.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from offload.hardware import peak_rss_bytes
from offload.planner.schedule import Download, Upload
from offload.planner.training_steps import Update, UpdateThere


def batch(a: argparse.Namespace) -> dict[str, torch.Tensor]:
    """The same random ids for every system and step, so that losses can be compared and must fall."""
    vocabulary = AutoConfig.from_pretrained(a.model).vocab_size
    ids = torch.randint(0, vocabulary, (a.batch, a.length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def plain(a: argparse.Namespace) -> dict[str, Any]:
    """What mixed-precision training keeps in memory: float32 weights, gradients and moments."""
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32)
    model.gradient_checkpointing_enable()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=a.lr, weight_decay=0.0, fused=True)
    given, seconds, losses = batch(a), [], []
    for _ in range(a.steps):
        began = time.perf_counter()
        total = 0.0
        for _ in range(a.micro_batches):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**given).loss / a.micro_batches
            loss.backward()
            total += float(loss)
        if a.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), a.clip)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
        losses.append(total)
    return {"step_s": seconds, "loss": losses, "params": sum(p.numel() for p in model.parameters())}


def streamed(a: argparse.Namespace) -> dict[str, Any]:
    """offload: the optimizer's state on disk."""
    import offload

    given, lines, lanes, disk, began = batch(a), [], [], [], time.perf_counter()
    with offload.finetuning(
        a.model, learning_rate=a.lr, max_grad_norm=a.clip or None, cpu_memory=a.cpu_memory, offload_dir=a.offload_dir,
        overwrite=True, optimizer=a.optimizer, tokens=a.batch * a.length, resident=a.resident, method=a.method,
        zo_write_every=a.write_every, **on_device(a),
    ) as trainer:  # fmt: skip
        ready_s = time.perf_counter() - began
        for _ in range(a.steps):
            trainer.training.timeline.reset()
            before = trainer._engine.statistics().busy_s
            result = trainer.step([given] * a.micro_batches)
            totals = trainer.training.timeline.totals()
            lines.append(result)
            lanes.append(totals)
            disk.append(trainer._engine.statistics().busy_s - before)
        began = time.perf_counter()
        trainer.commit()
        commit_s = time.perf_counter() - began
        spare, where = trainer.spare, trainer.whereabouts()
        params = sum(p.numel() for p in trainer.model.parameters())
        steps = trainer.training.schedule() if a.method == "full" else ()
    shutil.rmtree(a.offload_dir)
    kept = {f"kept_{name}": n for name, n in asdict(spare).items()} if spare is not None else {}
    kept |= asdict(where) if where is not None else {}
    return {
        "step_s": [r.step_s for r in lines],
        "loss": [r.loss for r in lines],
        "grad_norm": [r.grad_norm for r in lines],
        "read_bytes": [r.read_bytes for r in lines],
        "write_bytes": [r.write_bytes for r in lines],
        "waited_s": [t.stall_s.get("compute:read", 0.0) for t in lanes],
        "stall_s": [t.stall_s for t in lanes],
        "update_s": [t.busy_s.get("update", 0.0) for t in lanes],
        "busy_s": [t.busy_s for t in lanes],
        "disk_busy_s": disk,
        "updates_there": sum(isinstance(s, UpdateThere) for s in steps),
        "updates_here": sum(isinstance(s, Update) for s in steps),
        "upload_bytes": sum(s.nbytes for s in steps if isinstance(s, Upload)),
        "download_bytes": sum(s.nbytes for s in steps if isinstance(s, Download)),
        "ready_s": ready_s,
        "commit_s": commit_s,
        "params": params,
    } | kept


def forward(a: argparse.Namespace) -> dict[str, Any]:
    """Forward passes with a loss, by the inference engine with torch's own ops and the loss as training computes it."""
    import offload
    from offload.runtime.losses import use_pieces

    given, seconds, losses, read = batch(a), [], [], []
    handle = offload.load(a.model, cpu_memory=a.cpu_memory, batch=a.batch, context=a.length, exact=True)
    with handle as model, torch.no_grad():
        back = use_pieces(model)
        for _ in range(a.steps):
            began, before = time.perf_counter(), handle.session.statistics()
            total = sum(float(model(**given, use_cache=False).loss) for _ in range(a.micro_batches))
            seconds.append(time.perf_counter() - began)
            read.append(handle.session.statistics().read_bytes - before.read_bytes)
            losses.append(total / a.micro_batches)
        back()
    return {"step_s": seconds, "loss": losses, "read_bytes": read}


def on_device(a: argparse.Namespace) -> dict[str, Any]:
    """What says that an accelerator computes."""
    if a.device is None:
        return {}
    share = "auto" if a.update_share is None else a.update_share
    there = {"device": a.device, "gpu_memory": a.gpu_memory, "link": a.link, "overlap": not a.no_overlap}
    return there | {"update_share": share}


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("model", type=Path)
    ap.add_argument("--system", choices=("offload", "plain", "forward"), default="offload")
    ap.add_argument("--method", choices=("full", "lora", "zo"), default="full", help="of offload")
    ap.add_argument("--batch", type=int, default=2)
    ap.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    ap.add_argument("--micro-batches", type=int, default=1, help="of a step")
    ap.add_argument("--steps", type=int, default=6)
    ap.add_argument("--lr", type=float, default=1e-4)
    ap.add_argument("--clip", type=float, default=1.0, help="0: no clipping")
    ap.add_argument("--optimizer", default="adamw")
    ap.add_argument(
        "--write-every", type=int, help="zo: steps after which weights are written back; default: as it pays"
    )
    ap.add_argument("--cpu-memory", default="4GiB")
    ap.add_argument("--resident", help="how much of the optimizer's state stays in memory; default: what fits")
    ap.add_argument("--device", help="what computes: emulated, cuda")
    ap.add_argument("--gpu-memory")
    ap.add_argument("--link", help="pace of the emulated device's link, as in 1GB/s")
    ap.add_argument("--update-share", type=float, help="of the updates that the device makes; default: as predicted")
    ap.add_argument("--no-overlap", action="store_true", help="moving, computing and updating one after the other")
    ap.add_argument("--offload-dir", type=Path, help="a new folder for the optimizer's state; removed at the end")
    a = ap.parse_args()
    found = {"plain": plain, "forward": forward, "offload": streamed}[a.system](a)
    print(json.dumps(found | {"system": a.system, "peak_rss_bytes": peak_rss_bytes()}))


if __name__ == "__main__":
    main()
