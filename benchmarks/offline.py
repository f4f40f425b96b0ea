"""Offline generation: a file of prompts under a memory limit, beside accelerate's disk offload and the cores' own rate.

    python benchmarks/offline.py --model DIR --limit 4GiB --memlimit SCRIPT             # 256 prompts of 128 + 64 tokens
    python benchmarks/offline.py --model DIR --limit 4GiB --memlimit SCRIPT --scaled    # 64 prompts of 128 + 16
    python benchmarks/offline.py ... --only offload                                     # no peer
    python benchmarks/offline.py ... --peer 64:1500MiB --peer 96:500MiB                  # batch, memory for weights

SCRIPT runs a command in a memory cgroup: `memlimit.sh -c SIZE COMMAND...`, which prints its peak to standard error.

The bound is the work of all prompts' and new tokens' matrix products (the head's for new tokens only) over the rate at
which torch multiplies 1024 rows by matrices of the model's shapes, measured just before and just after each run; the
better reading counts. Reading weights is not in it: a machine with memory enough would not.

Accelerate generates a block of prompts at a time. One block is measured whole in its prefill, and --peer-new tokens of
decoding; the others and the later tokens are taken to be as fast, which favours it: keys and values grow.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from datetime import date
from math import ceil
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from report import RESULTS, SCRATCH, checkpoint_bytes, hardware, largest_shard, machine_line, number, table, write
from runner import announce, run

from offload.hardware import versions

FIGURE, SCALED = (256, 128, 64), (64, 128, 16)
PEERS = ("64:1500MiB", "96:500MiB")
TIMES, OF_BOUND = 3.0, 0.8  # what is to be reached


def arguments() -> argparse.Namespace:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    ap.add_argument("--limit", default="4GiB", help="memory of each process")
    ap.add_argument("--memlimit", type=Path, help="memlimit.sh; without it nothing limits memory from outside")
    ap.add_argument("--prompts", type=int, help="how many; default 256")
    ap.add_argument("--prompt", type=int, help="tokens of each; default 128")
    ap.add_argument("--new", type=int, help="new tokens of each; default 64")
    ap.add_argument("--scaled", action="store_true", help="64 prompts of 128 + 16 tokens instead")
    ap.add_argument("--peer", action="append", help="accelerate's batch and memory for weights, as 64:1500MiB")
    ap.add_argument("--peer-new", type=int, default=4, help="tokens that accelerate is measured for")
    ap.add_argument("--only", choices=["offload", "peer"])
    ap.add_argument("--rounds", type=int, default=1)
    ap.add_argument("--out", type=Path, default=RESULTS)
    ap.add_argument("--part", choices=["rates"], help=argparse.SUPPRESS)
    return ap.parse_args()


def matrices(model: Path) -> tuple[list[tuple[int, int]], int, int]:
    """Shapes of one block's matrices, elements of all blocks' matrices, and of the head's."""
    from offload.checkpoint.outline import sketch

    units = sketch(model).spec.units
    blocks = [[t for t in u.tensors if t.width and not t.is_table and not t.experts] for u in units if u.layers]
    head = sum(t.elements for u in units if u.is_head for t in u.tensors if t.width)
    shapes = [(t.elements // t.width, t.width) for t in blocks[0]]
    return shapes, sum(t.elements for block in blocks for t in block), head


def rates(model: Path) -> dict[str, float]:
    """FLOP/s of products of many rows with matrices of the model's shapes, and bytes/s of the disk."""
    import torch

    from offload.io.rate import read_rate

    shapes, _, _ = matrices(model)
    weights = [torch.randn(outputs, inputs).bfloat16() for outputs, inputs in shapes * 2]
    rows = {inputs: torch.randn(1024, inputs).bfloat16() for _, inputs in shapes}
    work, found = 2.0 * 1024 * sum(w.numel() for w in weights), []
    for _ in range(12):
        began = time.perf_counter()
        for weight in weights:
            torch.nn.functional.linear(rows[weight.shape[1]], weight)
        found.append(work / (time.perf_counter() - began))
    return {"gemm": median(found), "disk": read_rate(largest_shard(model), seconds=1.0)}


def prompts(count: int, tokens: int, vocabulary: int, path: Path) -> None:
    """Random prompts, the same every time."""
    numbers = random.Random(0)
    with path.open("w") as file:
        for _ in range(count):
            file.write(json.dumps({"prompt_ids": [numbers.randrange(10, vocabulary) for _ in range(tokens)]}) + "\n")


def limited(a: argparse.Namespace) -> list[str]:
    """What a command is put behind."""
    return [str(a.memlimit), "-c", a.limit.replace("iB", "")] if a.memlimit else []


def ours(a: argparse.Namespace, folder: Path) -> list[str]:
    command = [sys.executable, "-m", "offload", "generate", str(a.model), str(folder / "prompts.jsonl")]
    answers = folder / f"answers-{time.monotonic_ns()}.jsonl"
    options = ["--max-new-tokens", str(a.new), "--cpu-memory", a.limit, "--ignore-eos", "--json"]
    return [*limited(a), *command, "-o", str(answers), *options]


def theirs(a: argparse.Namespace, peer: str) -> list[str]:
    batch, _, memory = peer.partition(":")
    script = Path(__file__).parent / "peer_accelerate.py"
    shape = ["--batch", batch, "--prompt", str(a.prompt), "--new", str(a.peer_new)]
    return [*limited(a), sys.executable, str(script), str(a.model), "--place", "disk", "--cpu-mem", memory, *shape]


def whole_job(line: dict[str, Any], a: argparse.Namespace) -> float | None:
    """Seconds of all prompts: as measured, or as a block of accelerate's says."""
    if line.get("exit"):
        return None
    if "generate_s" in line:
        return float(line["generate_s"])
    blocks = ceil(a.prompts / line["batch"])
    return blocks * (line["prefill_s"] + (a.new - 1) * line["decode_s_per_token_median"])


def main() -> None:
    a = arguments()
    if a.part == "rates":
        print(json.dumps(rates(a.model)))
        return
    default = SCALED if a.scaled else FIGURE
    a.prompts, a.prompt, a.new = a.prompts or default[0], a.prompt or default[1], a.new or default[2]
    vocabulary = json.loads((a.model / "config.json").read_text())["vocab_size"]
    _, blocks, head = matrices(a.model)
    work = 2.0 * a.prompts * (blocks * (a.prompt + a.new - 1) + head * a.new)
    SCRATCH.mkdir(exist_ok=True)
    lines: list[dict[str, Any]] = []
    with TemporaryDirectory(dir=SCRATCH) as scratch:
        prompts(a.prompts, a.prompt, vocabulary, Path(scratch) / "prompts.jsonl")
        for number_of_round in range(1, a.rounds + 1):
            before = run([sys.executable, __file__, "--model", str(a.model), "--part", "rates"], timeout_s=120)
            commands = [] if a.only == "peer" else [("offload", ours(a, Path(scratch)))]
            if a.only != "offload":
                commands += [(f"accelerate, {p}", theirs(a, p)) for p in a.peer or PEERS]
            for name, command in commands:
                line = run(command, timeout_s=3600)
                after = run([sys.executable, __file__, "--model", str(a.model), "--part", "rates"], timeout_s=120)
                line |= {"name": name, "round": number_of_round, "rates": [before, after], "job_s": whole_job(line, a)}
                line.pop("tokens", None)
                lines.append(line)
                announce(line, f"round {number_of_round}, {name}, {number(line['job_s'])} s")
                before = after
    page = as_page(a, lines, work)
    print(page)
    facts = {"hardware": hardware(a.model), "versions": versions(), "work_flops": work}
    options = {"prompts": a.prompts, "prompt": a.prompt, "new": a.new, "limit": a.limit}
    write("offline", facts | options | {"lines": lines}, page, a.out)


def as_page(a: argparse.Namespace, lines: list[dict[str, Any]], work: float) -> str:
    """The table, and what it rests on."""
    new = a.prompts * a.new
    rows, speeds = [], {}
    for name in dict.fromkeys(line["name"] for line in lines):
        good = [line for line in lines if line["name"] == name and line["job_s"]]
        if not good:
            failed = next(line for line in lines if line["name"] == name)
            rows.append([name, *[""] * 8, f"failed: exit {failed['exit']}"])
            continue
        seconds = median(line["job_s"] for line in good)
        gemm = median(max(r["gemm"] for r in line["rates"] if "gemm" in r) for line in good)
        disk = median(max(r["disk"] for r in line["rates"] if "disk" in r) for line in good)
        bound = median(work / max(r["gemm"] for r in line["rates"] if "gemm" in r) for line in good)
        peak = max(line.get("cgroup", {}).get("peak_cgroup_bytes") or line["peak_rss_bytes"] for line in good)
        speeds[name] = new / seconds
        cells = [number(seconds), number(new / seconds), f"{bound / seconds:.2f}", number(gemm, scale=1e9)]
        foreseen = median(line.get("predicted_s") or 0.0 for line in good)
        said = [number(foreseen), f"{100 * (foreseen / seconds - 1):+.0f} %"] if foreseen else ["", ""]
        rows.append([name, *cells, number(disk, scale=1e9), number(peak, scale=2**30), *said, ""])
    own = speeds.get("offload")
    peers = {name: speed for name, speed in speeds.items() if name != "offload"}
    text = (
        f"# Offline generation, {date.today()}\n\n{machine_line(hardware(a.model))} Model: "
        f"{checkpoint_bytes(a.model) / 1e9:.2f} GB; {a.prompts} prompts of {a.prompt} tokens, {a.new} new tokens each; "
        f"memory limit {a.limit}{'' if a.memlimit else ' (not enforced from outside)'}; medians of {a.rounds} rounds. "
        f"{work / 1e12:.1f} TFLOP of matrix products.\n\n"
    )
    header = ["", "seconds", "new tokens/s", "of the bound", "GEMM, GFLOP/s", "disk, GB/s", "peak, GiB"]
    header += ["predicted, s", "off by", ""]
    text += table(header, rows)
    text += (
        "\nLoading does not count. The bound is that work over the rate of torch's product of 1024 rows, as measured "
        "around each run; what the disk read in the same minutes stands beside it. For accelerate (batch:memory for "
        f"weights) one block's prefill and {a.peer_new} tokens were measured, and the rest follows from them.\n"
    )
    if own and peers:
        best = max(peers, key=peers.__getitem__)
        text += f"\n{own / peers[best]:.2f} times the tokens/s of the best peer ({best}); to be reached: {TIMES:g}.\n"
    if own:
        text += f"To be reached of the bound: {OF_BOUND:g}.\n"
    for line in (line for line in lines if line["name"] == "offload" and line["job_s"]):
        text += (
            f"\nOf {number(line['job_s'])} s the model's units computed for {number(line['compute_s'])} s; "
            f"{line['passes']} passes read {line['read_bytes'] / 1e9:.0f} GB. Up to {line['batch']} prompts ran at a "
            f"time; memory was divided {line.get('divisions', 1)} times.\n"
        )
    return text


if __name__ == "__main__":
    main()
