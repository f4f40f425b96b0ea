"""Seconds per token of offload beside accelerate, llama.cpp and AirLLM, under one memory limit on one machine.

    python benchmarks/decode.py --model DIR --peer-scripts DIR --gguf FILE --llamacpp-python PATH \\
        --shards DIR --airllm-python PATH          # the whole comparison; root, for the memory limit
    python benchmarks/decode.py --model DIR        # offload and accelerate, without a memory limit
    python benchmarks/decode.py ... --dry-run      # print the commands and what would not be measured, and why
    python benchmarks/decode.py --again FILE.json  # tables from an earlier run's lines

Rounds are interleaved: each runs every command once, so that a slow spell of the disk hits all systems, and the disk's
ceiling is read before and after each system. --peer-scripts is a folder with memlimit.sh, disk_limit.py and
decode_{accelerate,llamacpp,airllm}.py; without it nothing limits memory, and the tables say so.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import tables
from report import RESULTS, ROOT, SCRATCH, checkpoint_bytes, hardware, largest_shard, made_checkpoint, write
from report import machine_line as machine
from runner import announce, run

from offload.hardware import versions
from offload.units import format_bytes, parse_bytes

PEERS = tables.PACKED, tables.ACCELERATE, tables.LLAMACPP, tables.AIRLLM


@dataclass(frozen=True)
class Job:
    """A command of every round."""

    system: str
    batch: int | None
    command: list[str]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model", type=Path, help="checkpoint folder; default: a random one of 6 GB, made in scratch/")
    ap.add_argument("--packed", type=Path, help="the same weights by `offload pack`")
    ap.add_argument("--peer-scripts", type=Path, help="folder with the peers' scripts")
    ap.add_argument("--gguf", type=Path, help="the same weights for llama.cpp")
    ap.add_argument("--shards", type=Path, help="the same weights as AirLLM's files, one per layer")
    ap.add_argument("--accelerate-python", default=sys.executable, help="an environment with accelerate")
    ap.add_argument("--llamacpp-python", help="an environment with llama-cpp-python")
    ap.add_argument("--airllm-python", help="an environment with airllm")
    ap.add_argument("--accelerate-cpu-mem", default="2500MiB", help="of the limit, what accelerate may use for weights")
    ap.add_argument("--limit", default="4GiB", help="memory limit of every system, and our --cpu-memory")
    ap.add_argument("--batches", default="1,8,32", help="AirLLM runs batch 1 only")
    ap.add_argument("--prompt", type=int, default=32, help="prompt tokens: the ids from 3 on")
    ap.add_argument("--new", type=int, default=16, help="new tokens per sequence")
    ap.add_argument("--rounds", type=int, default=3)
    ap.add_argument("--timeout", type=float, default=540, help="seconds per command")
    ap.add_argument("--only", default="", help="systems to run, such as offload,accelerate; default: all that can")
    ap.add_argument("--extra", default="", help="more options for `offload run`, in one word: --extra='--io uring'")
    ap.add_argument("--out", type=Path, default=RESULTS)
    ap.add_argument("--again", type=Path, help="do not measure: tables from the lines of this result")
    ap.add_argument("--dry-run", action="store_true")
    return ap.parse_args(argv)


def limiter(a: argparse.Namespace) -> tuple[list[str], str]:
    """(what to put before a command, what is said about the memory limit)."""
    size = format_bytes(parse_bytes(a.limit))
    script = a.peer_scripts and a.peer_scripts / "memlimit.sh"
    if not script or not script.is_file():
        return [], f"No memory limit: memlimit.sh was not given (--peer-scripts). offload keeps to {size} by itself."
    if os.geteuid():
        return [], f"No memory limit: creating a memory cgroup needs root. offload keeps to {size} by itself."
    return [str(script), "-c", str(parse_bytes(a.limit))], f"Every system runs cold in a memory cgroup of {size}."


def ours(a: argparse.Namespace, model: Path, batch: int) -> list[str]:
    prompt = ",".join(str(k) for k in range(3, 3 + a.prompt))
    command = [sys.executable, "-m", "offload.cli", "run", str(model), "--device", "cpu", "--cpu-memory", a.limit]
    command += ["--prompt-ids", prompt, "--max-new-tokens", str(a.new), "--batch", str(batch), "--ignore-eos", "--json"]
    return command + a.extra.split()


def peer(a: argparse.Namespace, system: str, batch: int) -> tuple[list[str], str]:
    """(command, "") of a peer, or ([], why it is not measured)."""
    sizes = ["--batch", str(batch), "--prompt", str(a.prompt), "--new", str(a.new)]
    if system == tables.PACKED:
        return (ours(a, a.packed, batch), "") if a.packed else ([], "no --packed")
    if system == tables.ACCELERATE:
        memory = ["--cpu-mem", a.accelerate_cpu_mem]
        script, place = ROOT / "benchmarks" / "peer_accelerate.py", ["--place", "disk"]
        if a.peer_scripts:
            script, place = a.peer_scripts / "decode_accelerate.py", ["--offload-dir", str(SCRATCH / "accelerate")]
        return [a.accelerate_python, str(script), str(a.model), *memory, *place, *sizes], ""
    if not a.peer_scripts:
        return [], "no --peer-scripts"
    if system == tables.LLAMACPP:
        python, needs = a.llamacpp_python, {"--gguf": a.gguf, "--llamacpp-python": a.llamacpp_python}
        name, options = "decode_llamacpp.py", [str(a.gguf), "--load", "mmap"]
    else:
        python, needs = a.airllm_python, {"--shards": a.shards, "--airllm-python": a.airllm_python}
        name, options = "decode_airllm.py", [str(a.model), "--shards", str(a.shards)]
    if missing := [option for option, value in needs.items() if not value]:
        return [], "no " + " and no ".join(missing)
    return [python, str(a.peer_scripts / name), *options, *sizes], ""


def plan(a: argparse.Namespace) -> tuple[list[Job], dict[str, str]]:
    """(the jobs of a round, why some peers are not among them)."""
    before, _ = limiter(a)
    batches = [int(part) for part in a.batches.split(",")]
    disk = []
    if a.peer_scripts and (a.peer_scripts / "disk_limit.py").is_file():
        script = str(a.peer_scripts / "disk_limit.py")
        disk = [Job(tables.DISK, None, [sys.executable, script, str(largest_shard(a.model)), "--quick"])]
    known = (tables.OURS, *PEERS)
    chosen = a.only.split(",") if a.only else known
    if unknown := sorted(set(chosen) - set(known)):
        raise SystemExit(f"--only {a.only}: no system {', '.join(unknown)}; there are {', '.join(known)}")
    jobs, left_out = list(disk), {}
    for system in known:
        if system not in chosen:
            left_out[system] = "not among --only"
            continue
        for batch in batches if system != tables.AIRLLM else [1]:
            command, why = (ours(a, a.model, batch), "") if system == tables.OURS else peer(a, system, batch)
            if why:
                left_out[system] = why
            else:
                jobs.append(Job(system, batch, [*before, *command]))
        jobs += disk if jobs[-1:] != disk else []
    return jobs, left_out


def measure(jobs: list[Job], rounds: int, timeout_s: float) -> list[tables.Line]:
    """Every line of every round, in order."""
    lines = []
    for k in range(rounds):
        for job in jobs:
            line = run(job.command, timeout_s=timeout_s)
            lines.append(line | {"system": job.system, "batch": job.batch, "round": k})
            what = f"round {k + 1} of {rounds}, {job.system}" + (f", batch {job.batch}" if job.batch else "")
            rate = line.get("mean_read_bytes_per_s")
            announce(line, what + (f", {rate / 1e9:.2f} GB/s" if rate else ""))
    return lines


def render(result: dict[str, Any]) -> tuple[str, list[tables.Check]]:
    """(the page, the figures to reach)."""
    lines, asked = result["lines"], result["asked"]
    wanted = [(tables.OURS, batch) for batch in asked["batches"]]
    wanted += [(s, batch) for s in PEERS for batch in asked["batches"] if s != tables.AIRLLM or batch == 1]
    found = tables.checks(lines, limit_bytes=asked["limit_bytes"], model_bytes=result["model_bytes"])
    agreed = [f"{what}: {same}" for what, same in tables.same_tokens(lines).items()]
    parts = [
        f"# Decode without a GPU, {result['date']}\n",
        f"{machine(result['hardware'])}. Model: {result['model']}, {result['model_bytes'] / 1e9:.2f} GB. "
        f"{result['limit']} Prompt {asked['prompt']} tokens, {asked['new']} new; medians of {asked['rounds']} "
        f"interleaved rounds. {tables.ceiling_line(lines)}\n",
        tables.decode_table(lines, wanted),
        "A step makes one token for each sequence. The bound is what a system itself reads per step (ours: at most "
        "what does not stay in memory) over the ceiling read just before and after it; ratios are taken within a "
        "round.\n",
        tables.checks_table(found),
    ]
    parts += [f"- {system}: not measured ({why})\n" for system, why in result["not_measured"].items()]
    if agreed:
        parts.append("Greedy tokens that agree with ours from the first on: " + "; ".join(agreed) + ".\n")
    doubts = tables.doubts(lines)
    parts.append("Doubtful: " + "; ".join(doubts) + ".\n" if doubts else "No run failed or had a busy neighbour.\n")
    return "\n".join(parts), found


def main() -> int:
    a = arguments()
    if a.again:
        result = json.loads(a.again.read_text())
        print(render(result)[0])
        return 0
    a.model = (a.model or made_checkpoint("3b")).absolute()
    for name in ("peer_scripts", "gguf", "shards", "packed"):
        if value := getattr(a, name):
            setattr(a, name, value.absolute())
    jobs, left_out = plan(a)
    if a.dry_run:
        print(limiter(a)[1])
        print("\n".join(f"{job.system}: {' '.join(job.command)}" for job in jobs))
        print("\n".join(f"{system}: not measured ({why})" for system, why in left_out.items()))
        return 0
    SCRATCH.mkdir(exist_ok=True)
    asked = {"batches": [int(part) for part in a.batches.split(",")], "limit_bytes": parse_bytes(a.limit)}
    result = {
        "date": date.today().isoformat(),
        "hardware": hardware(a.model),
        "versions": versions(),
        "model": a.model.name,
        "model_bytes": checkpoint_bytes(a.model),
        "limit": limiter(a)[1],
        "asked": asked | {"prompt": a.prompt, "new": a.new, "rounds": a.rounds},
        "not_measured": left_out,
        "lines": measure(jobs, a.rounds, a.timeout),
    }
    page, found = render(result)
    json_path, page_path = write("decode-cpu", result | {"checks": [check.as_dict() for check in found]}, page, a.out)
    print(f"\n{page}\n{json_path}\n{page_path}")
    return int(any(check.passed is False for check in found) or any(line["exit"] for line in result["lines"]))


if __name__ == "__main__":
    raise SystemExit(main())
