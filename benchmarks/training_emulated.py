"""Full fine-tuning on the emulated accelerator, which holds a part of the weights: a step beside its slowest lane.

    python benchmarks/training_emulated.py --offload-dir DIR                      # all cases
    python benchmarks/training_emulated.py --offload-dir DIR --cases link --add   # one, beside those of today's file

The twin paces its copies and really computes, on the CPU. A step can be no faster than its slowest lane: uploads and
downloads at the link's pace, forward and backward, updates on the CPU, reads and writes of state. What each has to do
is measured in a run in which nothing overlaps, so that no lane slows another down; the others must hide all but one.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

from report import RESULTS, SCRATCH, hardware, machine_line, number, table, write
from runner import announce, last_line, run

from offload.hardware import versions

Line = dict[str, Any]
TARGET = 1.15  # of the slowest lane
WARM_UP = 2  # steps
LANES = ("upload", "download", "compute", "update", "disk")
CASES = {  # what binds -> tokens of a row, and the words that make it so
    "link": (64, ["--gpu-memory", "100MiB", "--link", "250MB/s", "--resident", "1.0"]),
    "compute": (256, ["--gpu-memory", "240MiB", "--link", "4GB/s", "--resident", "1.0"]),
    "disk": (32, ["--gpu-memory", "100MiB", "--link", "2GB/s", "--resident", "0"]),
}
WAYS = {"one after the other": ["--no-overlap"], "overlap": [], "overlap, no clipping": ["--clip", "0"]}


def arguments() -> argparse.Namespace:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model", type=Path, help="checkpoint folder; default: a random one of 105 M parameters")
    ap.add_argument("--offload-dir", type=Path, required=True, help="a folder on the disk to use")
    ap.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    ap.add_argument("--steps", type=int, default=5, help="of each run, warming up included")
    ap.add_argument("--cpu-memory", default="6GiB")
    ap.add_argument("--timeout", type=float, default=120, help="seconds per run")
    ap.add_argument("--add", action="store_true", help="to what today's file has of other cases")
    ap.add_argument("--out", type=Path, default=RESULTS)
    return ap.parse_args()


def made() -> Path:
    """A Llama of 24 layers and width 576, random, in bf16."""
    folder = SCRATCH / "llama-105m"
    if not (folder / "config.json").exists():
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=8192, hidden_size=576, intermediate_size=1536, num_hidden_layers=24, num_attention_heads=9,
            num_key_value_heads=9, max_position_embeddings=1024, tie_word_embeddings=False,
        )  # fmt: skip
        LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


def steady(line: Line, key: str) -> float:
    return float(median(line[key][WARM_UP:]))


def loads(line: Line) -> dict[str, float]:
    """Seconds that each lane works in a step in which nothing else does; the disk's with reads and writes apart."""
    busy = {lane: median(step.get(lane, 0.0) for step in line["busy_s"][WARM_UP:]) for lane in LANES}
    return busy | {"disk": steady(line, "disk_busy_s")}


def summary(lines: list[Line]) -> list[dict[str, Any]]:
    """An entry for each run that overlaps."""
    found = []
    for case in dict.fromkeys(line["case"] for line in lines):
        ways = {line["way"]: line for line in lines if line["case"] == case and not line["exit"]}
        alone = ways.get("one after the other")
        if alone is None:
            continue
        lanes = loads(alone)
        slowest = max(lanes, key=lambda lane: lanes[lane])
        for way, line in ways.items():
            step = steady(line, "step_s")
            entry = {"case": case, "way": way, "step_s": step, "lanes_s": lanes, "slowest": slowest}
            entry |= {"over_slowest": step / lanes[slowest], "times": steady(alone, "step_s") / step}
            entry |= {"peak_rss_bytes": line["peak_rss_bytes"]}
            found.append(entry | {"processor_s": lanes["compute"] + lanes["update"]})
    return found


def page(result: dict[str, Any]) -> str:
    header = ["what binds", "way", "s/step", *(f"{lane}, s" for lane in LANES), "step / slowest lane", "slowest lane"]
    header += ["x one after the other", "peak, GiB", f"≤ {TARGET}"]
    rows = []
    for entry in result["summary"]:
        alone = entry["way"] == "one after the other"
        verdict = "" if alone else "pass" if entry["over_slowest"] <= TARGET else "FAIL"
        rows.append(
            [entry["case"], entry["way"], number(entry["step_s"])]
            + [number(entry["lanes_s"][lane]) if alone else "" for lane in LANES]
            + [number(entry["over_slowest"]), entry["slowest"], number(entry["times"])]
            + [number(entry["peak_rss_bytes"] / 2**30), verdict]
        )
    first = result["lines"][0]
    failed = [f"{x['case']}, {x['way']}: {last_line(x)}" for x in result["lines"] if x["exit"]]
    others = max(x["other_cpu_s"] / x["wall_s"] for x in result["lines"])
    parts = [
        f"# Full fine-tuning on the emulated accelerator, {result['date']}\n",
        f"{machine_line(result['hardware'])}. A Llama of {first.get('params', 0) / 1e6:.0f} M parameters in bf16 (two "
        "rows a step; see the script for links, tokens and the device's memory, which is less than the weights), AdamW "
        f"with float32 states. Medians of {len(first.get('step_s', ())) - WARM_UP} steps or more. Others used up to "
        f"{others:.2f} cores.\n",
        table(header, rows),
        "Loads are those of the run in which nothing overlaps. The twin computes on the CPU, which also updates and "
        "copies: on two cores these take from each other what a GPU's own processor and copy engines would not. "
        "Clipping makes updates wait for the norm: they run in the next forward, otherwise in the backward. "
        "In the case of the disk no state may stay in memory, which the ring of state has instead.\n",
    ]
    return "\n".join(parts + ([f"Failed: {'; '.join(failed)}\n"] if failed else []))


def main() -> int:
    a = arguments()
    model = (a.model or made()).absolute()
    a.offload_dir.mkdir(parents=True, exist_ok=True)
    today = a.out / f"training-emulated-{date.today().isoformat()}.json"
    lines = []
    if a.add and today.exists():
        lines = [line for line in json.loads(today.read_text())["lines"] if line["case"] not in a.cases]
    for case in a.cases:
        length, words = CASES[case]
        for way, more in WAYS.items():
            command = [sys.executable, "benchmarks/train_steps.py", str(model), "--device", "emulated", *words, *more]
            command += ["--length", str(length), "--steps", str(a.steps), "--cpu-memory", a.cpu_memory]
            command += ["--offload-dir", str(a.offload_dir / "state")]
            line = run(command, timeout_s=a.timeout)
            announce(line, f"{case}, {way}")
            lines.append(line | {"case": case, "way": way})
    result = {
        "date": date.today().isoformat(),
        "hardware": hardware(a.offload_dir),
        "versions": versions(),
        "summary": summary(lines),
        "lines": lines,
    }
    text = page(result)
    paths = write("training-emulated", result, text, a.out)
    print(f"\n{text}\n{paths[0]}\n{paths[1]}")
    return int(any(x["exit"] for x in lines) or any(x["over_slowest"] > TARGET for x in result["summary"][1:]))


if __name__ == "__main__":
    raise SystemExit(main())
