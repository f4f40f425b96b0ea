"""A model that fits in memory: tokens/s of every weight format, beside llama.cpp with as many bits, in one loop.

    python benchmarks/in_memory.py --model DIR --peer-scripts DIR --gguf FILE --llamacpp-python PATH
    python benchmarks/in_memory.py --model DIR                       # offload alone
    python benchmarks/in_memory.py ... --formats none,int8 --batches 1 --rounds 1
    python benchmarks/in_memory.py --again FILE.json                 # tables from an earlier run's lines

Each round starts every system once, in fresh processes; nothing limits memory and nothing is streamed. --gguf is the
model in bf16; its quantised brothers are made beside it on the first call. A step's bound is the bytes of weights that
it reads over the rate at which this machine reads memory, measured in the same process (llama.cpp's: in ours of the
same round). --peer-scripts is a folder with decode_llamacpp.py.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

from report import RESULTS, ROOT, checkpoint_bytes, hardware, machine_line, made_checkpoint, number, table, write
from runner import announce, run
from tables import DISTURBED, Check, checks_table, doubts, middle

from offload.hardware import versions

OURS, LLAMACPP = "offload", "llama.cpp"
FOUR_BITS = "int4-32-symmetric"  # 32 weights share one scale of 16 bits, as in Q4_0
PEER_OF = {"none": "bf16", "int8": "Q8_0", FOUR_BITS: "Q4_0"}  # our format -> the peer's of about as many bits
TABLE_BITS = {"bf16": 16.0, "Q8_0": 8.5, "Q4_0": 4.5}  # of an embedding's weight, which no step reads whole
AREA = 512 << 20  # bytes, to measure memory with
Line = dict[str, Any]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model", type=Path, help="checkpoint folder; default: a random one of 6 GB, made in scratch/")
    ap.add_argument("--formats", default=f"none,lossless,int8,int4,{FOUR_BITS}", help="of our weights")
    ap.add_argument("--batches", default="1,4,16")
    ap.add_argument("--prompt", type=int, default=32, help="prompt tokens: the ids from 3 on")
    ap.add_argument("--new", type=int, default=17, help="new tokens per sequence; the first is the prefill's")
    ap.add_argument("--rounds", type=int, default=3)
    ap.add_argument("--peer-scripts", type=Path, help="folder with the peers' scripts")
    ap.add_argument("--gguf", type=Path, help="the same weights in bf16 for llama.cpp")
    ap.add_argument("--llamacpp-python", help="an environment with llama-cpp-python")
    ap.add_argument("--llamacpp-load", default="read", help="read: in memory of its own; mmap: in the page cache")
    ap.add_argument("--lock", type=Path, help="a file to lock for each command, where other benchmarks run too")
    ap.add_argument("--tries", type=int, default=1, help="make a run that others disturbed again, so many times in all")
    ap.add_argument("--timeout", type=float, default=540, help="seconds per command")
    ap.add_argument("--out", type=Path, default=RESULTS)
    ap.add_argument("--again", type=Path, help="do not measure: tables from the lines of this result")
    ap.add_argument("--part", help=argparse.SUPPRESS)
    return ap.parse_args(argv)


def ours(model: Path, weights: str, batches: Sequence[int], prompt: int, new: int) -> dict[str, Any]:
    """Loads the model once and generates at every batch size; memory's rate is measured before and after each."""
    from offload import load
    from offload.generate import generate
    from offload.hardware import peak_rss_bytes

    chosen = {} if weights == "none" else {"weights": weights}
    sizes = {"batch": max(batches), "context": prompt + new, "prompt_tokens": prompt}
    runs = {}
    with (handle := load(model, device="cpu", exact=False, **sizes, **chosen)) as module:
        ids = list(range(3, 3 + prompt))
        generate(module, handle.session, [ids], new_tokens=3, stop_at_eos=False, do_sample=False)
        reading = Bandwidth()
        for batch in batches:
            before = reading.rate()
            made = generate(module, handle.session, [ids] * batch, new_tokens=new, stop_at_eos=False, do_sample=False)
            runs[batch] = made.as_dict() | {"read_rate": (before + reading.rate()) / 2}
        table_bytes = module.get_input_embeddings().weight.nbytes
        if module.config.get_text_config().tie_word_embeddings:
            table_bytes = 0  # the head reads it
        return {
            "ready_s": handle.ready_s,
            "format": str(getattr(handle, "weights", None) or "none"),
            "streamed_bytes": handle.streamed_nbytes,
            "step_bytes": handle.resident_nbytes - table_bytes,
            "peak_rss_bytes": peak_rss_bytes(),
            "fallbacks": list(handle.fallbacks),
            "runs": runs,
        }


class Bandwidth:
    """Reads an area of huge pages as the kernels do."""

    def __init__(self) -> None:
        from offload.io.buffers import Buffer
        from offload.tiers.host import as_tensor

        self._area = as_tensor(Buffer(AREA).view).fill_(1)

    def rate(self) -> float:
        """Bytes a second, the median of five readings."""
        from time import perf_counter

        from offload.kernels.cpu import bandwidth

        seconds = []
        for _ in range(5):
            began = perf_counter()
            bandwidth.read(self._area)
            seconds.append(perf_counter() - began)
        return AREA / median(seconds)


def quantised(a: argparse.Namespace) -> dict[str, Path]:
    """The peer's files by format. Makes those that are not there yet."""
    files = {"bf16": a.gguf}
    for kind in ("Q8_0", "Q4_0"):
        files[kind] = a.gguf.with_name(f"{a.gguf.stem}.{kind}.gguf")
        if not files[kind].is_file():
            script = str(ROOT / "benchmarks" / "peer_gguf.py")
            line = run([a.llamacpp_python, script, str(a.gguf), str(files[kind]), "--to", kind], timeout_s=1200)
            if line["exit"]:
                raise SystemExit(f"no {kind}: {line['error']}")
    return files


def commands(a: argparse.Namespace) -> Iterator[tuple[Line, list[str]]]:
    """(what a run is, its command) for every run of a round: ours, and behind it the peer with as many bits."""
    sizes = ["--prompt", str(a.prompt), "--new", str(a.new)]
    script = a.peer_scripts and a.peer_scripts / "decode_llamacpp.py"
    files = quantised(a) if a.gguf and a.llamacpp_python and script else {}
    for weights in a.formats.split(","):
        me = [sys.executable, __file__, "--part", weights, "--model", str(a.model), "--batches", a.batches]
        yield {"system": OURS, "weights": weights, "batch": None}, [*me, *sizes]
        kind = PEER_OF.get(weights)
        for batch in a.batches.split(",") if kind in files else ():
            them = [a.llamacpp_python, str(script), str(files[kind]), "--load", a.llamacpp_load, "--batch", batch]
            what = {"system": LLAMACPP, "weights": kind, "batch": int(batch)}
            yield what | {"step_bytes": files[kind].stat().st_size - table_bytes(a.model, kind)}, [*them, *sizes]


def table_bytes(model: Path, kind: str) -> int:
    """Bytes of the embedding in the peer's file, where the head has a matrix of its own."""
    config = json.loads((model / "config.json").read_text())
    tied = config.get("tie_word_embeddings", False)
    return 0 if tied else round(config["vocab_size"] * config["hidden_size"] * TABLE_BITS[kind] / 8)


@contextmanager
def alone(lock: Path | None) -> Iterator[None]:
    """Holds the lock, if there is one, as flock(1) does."""
    if lock is None:
        yield
        return
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def undisturbed(command: list[str], a: argparse.Namespace) -> Line:
    """Runs a command; again where it failed or others computed beside it, while there are tries. The last counts."""
    line: Line = {}
    for _ in range(a.tries):
        with alone(a.lock):
            line = run(command, timeout_s=a.timeout)
        if not line["exit"] and line["other_cpu_s"] <= DISTURBED * line["wall_s"]:
            break
    return line


def measure(a: argparse.Namespace) -> list[Line]:
    """A line for each system, format, batch and round."""
    lines: list[Line] = []
    todo = list(commands(a))
    for k in range(a.rounds):
        for what, command in todo:
            line = undisturbed(command, a) | what | {"round": k}
            runs = line.pop("runs", {"": {}})
            for batch, more in runs.items():
                one = line | more | ({"batch": int(batch)} if batch else {})
                lines.append(one)
                announce(one, f"round {k + 1}, {one['system']} {one['weights']}, batch {one['batch']}")
    return lines


def step(line: Line) -> float:
    """Seconds of a decode step: the median, since a neighbour's moment should not count for all."""
    return float(median(line["token_s"]))


def rows(lines: Sequence[Line]) -> Iterator[tuple[tuple[str, str, int], list[Line]]]:
    """The good runs of each (batch, system, weights), smallest batch first."""
    good = [line for line in lines if not line["exit"]]
    keys = list(dict.fromkeys((line["system"], line["weights"], line["batch"]) for line in good))
    for key in sorted(keys, key=lambda key: key[2]):
        yield key, [line for line in good if (line["system"], line["weights"], line["batch"]) == key]


def read_rate(lines: Sequence[Line], k: int) -> float | None:
    """How fast memory was read in a round: the median of its readings."""
    return middle(line.get("read_rate") for line in lines if line["round"] == k)


def decode_table(lines: Sequence[Line]) -> str:
    header = ["system", "weights", "batch", "s/step", "tokens/s", "GB read/step", "GB/s", "of reading", "load, s"]
    cells = []
    for (system, weights, batch), runs in rows(lines):
        rates = [(run["step_bytes"] / step(run), read_rate(lines, run["round"])) for run in runs]
        shares = [rate / limit for rate, limit in rates if limit]
        seconds = median(map(step, runs))
        figures = [number(seconds), number(batch / seconds), number(runs[0]["step_bytes"], scale=1e9)]
        figures += [number(median(rate for rate, _ in rates), scale=1e9), number(middle(shares), 2)]
        load_s = middle(run.get("ready_s", run.get("load_s")) for run in runs)
        cells.append([system, runs[0].get("format", weights), str(batch), *figures, number(load_s)])
    return table(header, cells)


def ratio(lines: Sequence[Line], above: tuple[str, str], below: tuple[str, str], batch: int) -> float | None:
    """Tokens/s of one (system, weights) over another's, within a round, then the median over rounds."""

    def of(which: tuple[str, str]) -> dict[int, float]:
        found = dict(rows(lines)).get((*which, batch), [])
        return {line["round"]: step(line) for line in found}

    mine, theirs = of(above), of(below)
    return middle(theirs[k] / mine[k] for k in mine if k in theirs)


def checks(lines: Sequence[Line]) -> list[Check]:
    """The figures to reach at batch 1, and the same ratios at the others for information."""
    found = []
    for batch in sorted({line["batch"] for line in lines if line["batch"]}):
        pairs = [
            ("bf16 over llama.cpp bf16", (OURS, "none"), (LLAMACPP, "bf16"), 1.0),
            ("int8 over llama.cpp Q8_0", (OURS, "int8"), (LLAMACPP, "Q8_0"), 0.9),
            ("int4 over llama.cpp Q4_0", (OURS, FOUR_BITS), (LLAMACPP, "Q4_0"), 0.9),
            ("int4 over our bf16", (OURS, FOUR_BITS), (OURS, "none"), 2.5),
            ("lossless over our bf16", (OURS, "lossless"), (OURS, "none"), None),
        ]
        for name, above, below, target in pairs:
            value, wanted = ratio(lines, above, below, batch), target if batch == 1 else None
            found.append(Check(name=f"{name}, batch {batch}", value=value, target=wanted, at_least=True))
    return found


def render(result: dict[str, Any]) -> tuple[str, list[Check]]:
    """(the page, the figures to reach)."""
    lines, asked, found = result["lines"], result["asked"], checks(result["lines"])
    rates = sorted(line["read_rate"] / 1e9 for line in lines if line.get("read_rate"))
    reading = f"{median(rates):.1f} GB/s, {rates[0]:.1f} to {rates[-1]:.1f}" if rates else "not measured"
    said = doubts([line for line in lines if line["batch"] in (None, asked["batches"][0]) or line["exit"]])
    parts = [
        f"# Decode in memory, {result['date']}\n",
        f"{machine_line(result['hardware'])}. Model: {result['model']}, {result['model_bytes'] / 1e9:.2f} GB. Prompt "
        f"{asked['prompt']} tokens, {asked['new']} new; medians of {asked['rounds']} interleaved rounds; llama.cpp "
        f"loads by {asked['llamacpp_load']}. Memory is read at {reading} in the same loop.\n",
        decode_table(lines),
        "Bytes read are those of all weights but the embedding, which a step gathers rows from.\n",
        checks_table(found),
        "Doubtful: " + "; ".join(said) + ".\n" if said else "No run failed or had a busy neighbour.\n",
    ]
    return "\n".join(parts), found


def main() -> int:
    a = arguments()
    if a.again:
        print(render(json.loads(a.again.read_text()))[0])
        return 0
    batches = [int(part) for part in a.batches.split(",")]
    if a.part:
        print(json.dumps(ours(a.model, a.part, batches, a.prompt, a.new)))
        return 0
    a.model = (a.model or made_checkpoint("3b")).absolute()
    for name in ("peer_scripts", "gguf"):
        if value := getattr(a, name):
            setattr(a, name, value.absolute())
    asked = {"batches": batches, "prompt": a.prompt, "new": a.new, "rounds": a.rounds, "llamacpp_load": a.llamacpp_load}
    result = {
        "date": date.today().isoformat(),
        "hardware": hardware(a.model),
        "versions": versions(),
        "model": a.model.name,
        "model_bytes": checkpoint_bytes(a.model),
        "asked": asked,
        "lines": measure(a),
    }
    page, found = render(result)
    write("in-memory", result | {"checks": [check.as_dict() for check in found]}, page, a.out)
    print(f"\n{page}")
    return int(any(check.passed is False for check in found) or any(line["exit"] for line in result["lines"]))


if __name__ == "__main__":
    raise SystemExit(main())
