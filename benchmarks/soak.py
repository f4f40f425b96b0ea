"""A thousand decode steps in one process: does anything grow? And does a second load start clean?

    python benchmarks/soak.py --model DIR                # any small checkpoint; three quarters of it stream

Reports memory, open files and threads after every 50 steps. Each stretch is a generation of its own, from the same
prompt, so that keys and values are given back before memory is read: what remains is growth. Asserts nothing.
"""

from __future__ import annotations

import argparse
import gc
import os
import threading
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from report import RESULTS, checkpoint_bytes, hardware, machine_line, number, table, write

from offload.hardware import rss_bytes, versions
from offload.units import MIB

TARGET = 20 * MIB  # growth of resident memory over all steps
Reading = dict[str, Any]


def arguments() -> argparse.Namespace:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    ap.add_argument("--steps", type=int, default=1000, help="decode steps in all")
    ap.add_argument("--stretch", type=int, default=50, help="decode steps between readings")
    ap.add_argument("--resident", type=float, default=0.25, help="share of the weights that stays in memory")
    ap.add_argument("--device", default="cpu", help="cpu, cuda or emulated")
    ap.add_argument("--gpu-memory", help="for cuda and emulated")
    ap.add_argument("--link", help="for emulated, such as 8GB/s")
    ap.add_argument("--out", type=Path, default=RESULTS)
    return ap.parse_args()


def reading(steps: int) -> Reading:
    """What this process holds now."""
    gc.collect()
    return {
        "steps": steps,
        "rss_bytes": rss_bytes(),
        "open_files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "python_threads": threading.active_count(),
    }


def growth(readings: Sequence[Reading]) -> dict[str, int]:
    """From the first reading (after the first stretch, which warms up) to the largest later one; 0 when it shrank."""
    first, rest = readings[0], readings[1:] or readings
    return {key: max(r[key] for r in rest) - first[key] for key in ("rss_bytes", "open_files", "threads")}


def slope(readings: Sequence[Reading]) -> float:
    """Bytes of memory per step, by least squares: tells a leak from noise."""
    n = len(readings)
    x, y = [r["steps"] for r in readings], [r["rss_bytes"] for r in readings]
    mean_x, mean_y = sum(x) / n, sum(y) / n
    spread = sum((a - mean_x) ** 2 for a in x)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread if spread else 0.0


def generation(a: argparse.Namespace, stretches: int) -> dict[str, Any]:
    """Loads the model, generates so many stretches, closes it; what was read at each stage."""
    import torch

    import offload

    prompt = torch.tensor([list(range(3, 11))])
    options = {"resident": a.resident, "device": a.device, "gpu_memory": a.gpu_memory, "link": a.link}
    before = reading(0)
    handle = offload.load(a.model, context=prompt.shape[1] + a.stretch + 1, **options)
    with handle as model:
        loaded = reading(0)
        fresh = handle.session.statistics()
        readings, tokens, began = [], [], time.perf_counter()
        for k in range(stretches):
            ids = model.generate(  # the first of the new tokens is the prefill's
                prompt.to(model.device),
                attention_mask=torch.ones_like(prompt).to(model.device),
                max_new_tokens=a.stretch + 1,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            tokens.append(ids[0, prompt.shape[1] :].tolist())
            del ids
            readings.append(reading((k + 1) * a.stretch))
            print(f"{readings[-1]['steps']} steps, {readings[-1]['rss_bytes'] / MIB:.1f} MiB", flush=True)
        seconds = time.perf_counter() - began
        done = handle.session.statistics()
        streamed, resident = handle.streamed_nbytes, handle.resident_nbytes
        fallbacks = list(handle.fallbacks)
    del handle, model
    return {
        "before": before,
        "loaded": loaded,
        "readings": readings,
        "closed": reading(0),
        "passes_at_start": fresh.passes,
        "passes": done.passes,
        "read_bytes": done.read_bytes,
        "restarts": done.restarts,
        "streamed_bytes": streamed,
        "resident_bytes": resident,
        "seconds": seconds,
        "all_the_same_tokens": all(row == tokens[0] for row in tokens),
        "tokens": tokens[0],
        "fallbacks": fallbacks,
    }


def verdicts(first: dict[str, Any], second: dict[str, Any]) -> list[tuple[str, str, str, bool]]:
    """(what, measured, wanted, whether it is so)."""
    grown, steady = growth(first["readings"]), first["all_the_same_tokens"]
    left = {key: first["closed"][key] - first["before"][key] for key in ("open_files", "threads")}
    again = second["closed"]["rss_bytes"] - first["closed"]["rss_bytes"]
    same, counted = first["tokens"] == second["tokens"], second["passes_at_start"]
    names = {"open_files": "open files", "threads": "threads"}
    mib = f"{TARGET / MIB:.0f} MiB"
    return [
        ("memory grown", f"{grown['rss_bytes'] / MIB:.1f} MiB", f"≤ {mib}", grown["rss_bytes"] <= TARGET),
        *((f"{name} grown", str(grown[key]), "0", grown[key] <= 0) for key, name in names.items()),
        ("every generation gave the same tokens", str(steady), "True", steady),
        ("open files left after close", str(left["open_files"]), "0", left["open_files"] <= 0),
        ("passes counted when the second load begins", str(counted), "0", not counted),
        ("memory, second closing over first", f"{again / MIB:.1f} MiB", f"≤ {mib}", again <= TARGET),
        ("same tokens after the second load", str(same), "True", same),
        *(
            (f"{name}, second closing over first", str(more), "0", more <= 0)
            for key, name in names.items()
            for more in [second["closed"][key] - first["closed"][key]]
        ),
    ]


def page(result: dict[str, Any]) -> str:
    first = result["first"]
    steps = [(str(r["steps"]), r) for r in first["readings"]]
    shown = [("loaded", first["loaded"]), *steps, ("closed", first["closed"])]
    rows = [[what, number(r["rss_bytes"], 5, MIB), str(r["open_files"]), str(r["threads"])] for what, r in shown]
    said = [[what, found, wanted, "pass" if good else "FAIL"] for what, found, wanted, good in result["verdicts"]]
    per_step = slope(first["readings"])
    return "\n".join(
        [
            f"# Soak, {result['date']}\n",
            f"{machine_line(result['hardware'])}. Model: {result['model']}, {result['model_bytes'] / 1e9:.2f} GB, "
            f"{first['streamed_bytes'] / 1e6:.1f} MB of it streaming, device {result['device']}; {result['steps']} "
            f"decode steps in {first['seconds']:.0f} s, {first['passes']} passes, "
            f"{first['read_bytes'] / 1e9:.2f} GB read. Memory changes by {per_step / 1024:.2f} KiB a step "
            "(least squares).\n",
            table(["", "measured", "wanted", "verdict"], said),
            table(["after steps", "RSS, MiB", "open files", "threads"], rows),
        ]
    )


def main() -> int:
    a = arguments()
    a.model = a.model.absolute()
    first = generation(a, max(1, a.steps // a.stretch))
    second = generation(a, 1)
    result = {
        "date": date.today().isoformat(),
        "hardware": hardware(a.model),
        "versions": versions(),
        "model": a.model.name,
        "model_bytes": checkpoint_bytes(a.model),
        "device": a.device,
        "steps": first["readings"][-1]["steps"],
        "first": first,
        "second": second,
        "verdicts": verdicts(first, second),
    }
    text = page(result)
    paths = write("soak", result, text, a.out)
    print(f"\n{text}\n{paths[0]}\n{paths[1]}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
