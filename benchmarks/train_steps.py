"""A few training steps on one fixed batch, by offload or by a plain loop in memory: one JSON line.

    python benchmarks/train_steps.py MODEL --system offload --offload-dir DIR --cpu-memory 4GiB
    python benchmarks/train_steps.py MODEL --system plain            # float32 weights and moments under bf16 autocast

Both clip the gradient's norm to 1 unless told otherwise, use AdamW without weight decay, and compute blocks again in
the backward pass where memory wants it (plain: always). The first two steps warm up, and are not to be counted.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from offload.hardware import peak_rss_bytes
from offload.planner.schedule import Download, Upload


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

    given, lines, lanes, began = batch(a), [], [], time.perf_counter()
    with offload.finetuning(
        a.model, learning_rate=a.lr, max_grad_norm=a.clip or None, cpu_memory=a.cpu_memory, offload_dir=a.offload_dir,
        overwrite=True, optimizer=a.optimizer, tokens=a.batch * a.length, resident=a.resident, **on_device(a),
    ) as trainer:  # fmt: skip
        ready_s = time.perf_counter() - began
        for _ in range(a.steps):
            trainer.training.timeline.reset()
            result = trainer.step([given] * a.micro_batches)
            totals = trainer.training.timeline.totals()
            waited, update = totals.stall_s.get("compute:read", 0.0), totals.busy_s.get("update", 0.0)
            lines.append((result, waited, update))
            lanes.append(totals.busy_s)
        began = time.perf_counter()
        trainer.commit()
        commit_s = time.perf_counter() - began
        spare = trainer.spare
        assert spare is not None
        params = sum(p.numel() for p in trainer.model.parameters())
        steps = trainer.training.schedule()
    shutil.rmtree(a.offload_dir)
    return {
        "step_s": [r.step_s for r, _, _ in lines],
        "loss": [r.loss for r, _, _ in lines],
        "grad_norm": [r.grad_norm for r, _, _ in lines],
        "read_bytes": [r.read_bytes for r, _, _ in lines],
        "write_bytes": [r.write_bytes for r, _, _ in lines],
        "waited_s": [w for _, w, _ in lines],
        "update_s": [u for _, _, u in lines],
        "busy_s": lanes,
        "upload_bytes": sum(s.nbytes for s in steps if isinstance(s, Upload)),
        "download_bytes": sum(s.nbytes for s in steps if isinstance(s, Download)),
        "kept_weight_bytes": spare.weights_nbytes,
        "kept_state_bytes": spare.state_nbytes,
        "kept_graph_bytes": spare.graphs_nbytes,
        "ready_s": ready_s,
        "commit_s": commit_s,
        "params": params,
    }


def on_device(a: argparse.Namespace) -> dict[str, Any]:
    """What says that an accelerator computes."""
    if a.device is None:
        return {}
    return {"device": a.device, "gpu_memory": a.gpu_memory, "link": a.link, "overlap": not a.no_overlap}


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("model", type=Path)
    ap.add_argument("--system", choices=("offload", "plain"), default="offload")
    ap.add_argument("--batch", type=int, default=2)
    ap.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    ap.add_argument("--micro-batches", type=int, default=1, help="of a step")
    ap.add_argument("--steps", type=int, default=6)
    ap.add_argument("--lr", type=float, default=1e-4)
    ap.add_argument("--clip", type=float, default=1.0, help="0: no clipping")
    ap.add_argument("--optimizer", default="adamw")
    ap.add_argument("--cpu-memory", default="4GiB")
    ap.add_argument("--resident", help="how much of the optimizer's state stays in memory; default: what fits")
    ap.add_argument("--device", help="what computes: emulated, cuda")
    ap.add_argument("--gpu-memory")
    ap.add_argument("--link", help="pace of the emulated device's link, as in 1GB/s")
    ap.add_argument("--no-overlap", action="store_true", help="moving, computing and updating one after the other")
    ap.add_argument("--offload-dir", type=Path, help="a new folder for the optimizer's state; removed at the end")
    a = ap.parse_args()
    found = plain(a) if a.system == "plain" else streamed(a)
    print(json.dumps(found | {"system": a.system, "peak_rss_bytes": peak_rss_bytes()}))


if __name__ == "__main__":
    main()
