"""Decode on the emulated accelerator, whose memory holds a quarter of the model: step time against the slowest lane.

    python benchmarks/emulated.py --model DIR       # links of 2, 4, 8 and 16 GB/s; prefetch on and off; the CPU's share
    python benchmarks/emulated.py --model DIR --links 4GB/s --batch 32 --rounds 5

The twin paces its copies to a stated rate and really computes, on the CPU. A step can be no faster than its slowest
lane: bytes uploaded over the link's rate, bytes read over the disk's, or the computing itself. What computing takes is
measured apart, with the whole model in a device that is large enough, so that it holds no waiting and no contention.

Weights in main memory are sent over the link (share 0), multiplied by the CPU where they lie (share 1), or both.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

from report import RESULTS, checkpoint_bytes, hardware, machine_line, made_checkpoint, number, table, write
from runner import announce, last_line, run
from tables import DISTURBED

from offload.hardware import versions
from offload.units import parse_rate

Line = dict[str, Any]
TARGET = 1.1  # step time over the slowest lane's load, with prefetching
POSSIBLE = 0.97  # less is no measurement
SHARE = 4  # the model is so many times the device's memory
JOBS = ((2, "0"), (1, "0"), (2, "auto"), (2, "1"))  # slots of the ring, share of the CPU
PREFETCH, ALONE = 2, 1  # slots of the ring: one is read or uploaded into while the other computes; or not


def arguments() -> argparse.Namespace:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model", type=Path, help="checkpoint folder; default: a random one of 2 GB, made in scratch/")
    ap.add_argument("--links", default="2GB/s,4GB/s,8GB/s,16GB/s")
    ap.add_argument("--batch", type=int, default=1)
    ap.add_argument("--prompt", type=int, default=32, help="prompt tokens: the ids from 3 on")
    ap.add_argument("--new", type=int, default=16)
    ap.add_argument("--rounds", type=int, default=3)
    ap.add_argument("--gpu-memory", type=int, help=f"bytes; default: the checkpoint's over {SHARE}")
    ap.add_argument("--cpu-memory", help="so that part of the model streams from disk too; default: what is free")
    ap.add_argument("--timeout", type=float, default=300, help="seconds per run")
    ap.add_argument("--out", type=Path, default=RESULTS)
    return ap.parse_args()


def command(a: argparse.Namespace, gpu_memory: int, link: str | None, slots: int, share: str) -> list[str]:
    """One decode; without a link copies are not paced."""
    prompt = ",".join(str(k) for k in range(3, 3 + a.prompt))
    words = [sys.executable, "-m", "offload.cli", "run", str(a.model), "--device", "emulated", "--json", "--ignore-eos"]
    words += ["--gpu-memory", str(gpu_memory), "--slots", str(slots), "--prompt-ids", prompt]
    words += ["--max-new-tokens", str(a.new), "--batch", str(a.batch)]
    words += ["--cpu-share", share] + (["--link", link] if link else [])
    return words + (["--cpu-memory", a.cpu_memory] if a.cpu_memory else [])


def loads(line: Line, link: str, compute_s: float | None) -> dict[str, float]:
    """Seconds that each lane must work in one step of this run."""
    rate, disk = parse_rate(link), line.get("disk_bytes_per_s")
    return {
        "link": line["upload_bytes_per_token"] / rate,
        "disk": line["read_bytes_per_token"] / disk if disk else 0.0,
        "compute": compute_s if compute_s is not None else line["bound"]["compute_s"],
    }


def summary(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """One entry for each link, ring depth and share of the CPU, with medians over rounds; `lines` have link (None: all
    resident), slots and share.

    The median of step_s is over the runs' own medians, so that one slow step of the machine does not decide.
    """
    good = [line for line in lines if not line["exit"]]
    compute = [line["decode_s_per_token_median"] for line in good if line["link"] is None]
    compute_s = min(compute) if compute else None  # a load, so without what a neighbour added
    found = []
    for job in dict.fromkeys((line["link"], line["slots"], line["share"]) for line in good if line["link"]):
        link, slots, share = job
        runs = [line for line in good if (line["link"], line["slots"], line["share"]) == job]
        each = [loads(line, link, compute_s) for line in runs]
        lanes = {lane: median(load[lane] for load in each) for lane in each[0]}
        step_s, slowest = median(line["decode_s_per_token_median"] for line in runs), max(lanes, key=lambda k: lanes[k])
        found.append(
            {
                "link": link,
                "slots": slots,
                "share": share,
                "runs": len(runs),
                "step_s": step_s,
                "lanes_s": lanes,
                "slowest": slowest,
            }
            | {"over_bound": step_s / lanes[slowest], "upload_bytes": median(x["upload_bytes_per_token"] for x in runs)}
        )
    return found


def judged(entry: dict[str, Any]) -> str:
    """No step is faster than its bound: one that seems so shows that the bound was measured beside a busy neighbour."""
    if entry["over_bound"] < POSSIBLE:
        return "doubtful"
    return "pass" if entry["over_bound"] <= TARGET else "FAIL"


def page(result: dict[str, Any]) -> str:
    entries = result["summary"]
    rows = []
    for entry in entries:
        alone = [e["step_s"] for e in entries if e["link"] == entry["link"] and e["slots"] == ALONE]
        lanes, on = entry["lanes_s"], entry["slots"] != ALONE
        verdict = judged(entry) if on and entry["share"] == "0" else ""
        gain = number(alone[0] / entry["step_s"]) if alone and on else ""
        figures = [entry["step_s"], lanes["link"], lanes["disk"], lanes["compute"], entry["over_bound"]]
        cells = [
            entry["link"],
            "on" if on else "off",
            entry["share"],
            *(number(x) for x in figures),
            entry["slowest"],
            gain,
            verdict,
        ]
        rows.append([*cells, number(entry["upload_bytes"], 3, 1e9)])
    header = [
        "link",
        "prefetch",
        "CPU's share",
        "s/step",
        "link, s",
        "disk, s",
        "compute, s",
        "step / slowest lane",
        "slowest lane",
    ]
    header += ["x no prefetch", f"≤ {TARGET}", "GB uploaded/step"]
    failed = [
        f"{x['link']}, {x['slots']} slots, share {x['share']}: {last_line(x)}" for x in result["lines"] if x["exit"]
    ]
    busy = sum(x["other_cpu_s"] > DISTURBED * x["wall_s"] for x in result["lines"])
    parts = [
        f"# Emulated accelerator, {result['date']}\n",
        f"{machine_line(result['hardware'])}. Model: {result['model']}, {result['model_bytes'] / 1e9:.2f} GB; the "
        f"device has {result['gpu_memory'] / 1e9:.2f} GB, {result['model_bytes'] / result['gpu_memory']:.1f} times "
        f"less. Batch {result['batch']}; medians of {result['rounds']} interleaved rounds.\n",
        table(header, rows),
        "Compute is a step with the whole model on the device. Copies of the twin take a core and memory bandwidth, "
        "which a real link does not: on a machine with few cores the compute lane is slower beside them than alone. "
        "The twin computes on the CPU too, so the work of both processors adds up; on a real card they compute at "
        "once.\n",
        f"{busy} of {len(result['lines'])} runs had a neighbour that took more than {DISTURBED:.0%} of their time.\n",
    ]
    return "\n".join(parts + ([f"Failed: {'; '.join(failed)}\n"] if failed else []))


def main() -> int:
    a = arguments()
    a.model = (a.model or made_checkpoint("1b")).absolute()
    size = checkpoint_bytes(a.model)
    gpu_memory = a.gpu_memory or size // SHARE
    jobs: list[tuple[str | None, int, str]] = [(None, PREFETCH, "0")]
    jobs += [(link, *job) for link in a.links.split(",") for job in JOBS]
    lines = []
    for k in range(a.rounds):
        for link, slots, share in jobs:
            memory = gpu_memory if link else 2 * size + (1 << 30)
            line = run(command(a, memory, link, slots, share), timeout_s=a.timeout)
            announce(line, f"round {k + 1} of {a.rounds}, {link or 'all on the device'}, {slots} slots, share {share}")
            lines.append(line | {"link": link, "slots": slots, "share": share, "round": k})
    result = {
        "date": date.today().isoformat(),
        "hardware": hardware(a.model),
        "versions": versions(),
        "model": a.model.name,
        "model_bytes": size,
        "gpu_memory": gpu_memory,
        "batch": a.batch,
        "rounds": a.rounds,
        "summary": summary(lines),
        "lines": lines,
    }
    text = page(result)
    paths = write("emulated", result, text, a.out)
    print(f"\n{text}\n{paths[0]}\n{paths[1]}")
    ahead = [entry for entry in result["summary"] if entry["slots"] != ALONE and entry["share"] == "0"]
    return int(not ahead or any(judged(entry) != "pass" for entry in ahead) or any(line["exit"] for line in lines))


if __name__ == "__main__":
    raise SystemExit(main())
