"""From the raw lines of interleaved decode runs to a table and the figures to reach. Pure: no clock, no file.

A line is what a run printed, with `system`, `batch` and `round` set. Lines come in the order in which they were
measured, and lines of system "disk" lie between the others: the ceiling of a run is the rate of the disk lines just
before and just after it in its own round. Ratios are taken within a round, then the median over rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from statistics import median
from typing import Any

from report import number, table

Line = dict[str, Any]
LOSSLESS_S = 0.45  # a step of the 6.03 GB Llama in 4 GiB, with the disk at 3.6 GB/s
OURS, PACKED, ACCELERATE, LLAMACPP, AIRLLM, DISK = (
    "offload",
    "offload packed",
    "accelerate",
    "llama.cpp mmap",
    "airllm",
    "disk",
)
LIMIT_SHARE = 0.78  # of the memory limit that must hold weights, so that they need not be read
SCRATCH_KIB = 64  # what importing the libraries writes in the folder for temporary files
DISTURBED = 0.05  # other processes' CPU seconds per second of a run, above which it should not be believed


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One run of one system, in the same words for all of them.

    Attributes:
        step_s: mean wall time of a decode step, which makes a token for each of `batch` sequences.
        read_bytes: read from the disk per step.
        ceiling: bytes per second of the disk around this run; None when it was not measured.
        bound_s: what a step must take: its bytes over the ceiling.
    """

    system: str
    batch: int
    round: int
    step_s: float
    read_bytes: float
    ceiling: float | None
    bound_s: float | None
    load_s: float | None
    prefill_s: float | None
    peak_rss_bytes: int | None
    line: Line


@dataclass(frozen=True, kw_only=True)
class Check:
    """A figure to reach. `value` is None when what it needs was not measured; `target` None makes it information."""

    name: str
    value: float | None
    target: float | None
    at_least: bool = False
    unit: str = "×"

    @property
    def passed(self) -> bool | None:
        if self.value is None or self.target is None:
            return None
        return self.value >= self.target if self.at_least else self.value <= self.target

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        return {None: "", True: "pass", False: "FAIL"}[self.passed]

    def cells(self) -> list[str]:
        sign = "≥" if self.at_least else "≤"
        value = "" if self.value is None else f"{number(self.value, 4)} {self.unit}"
        target = "" if self.target is None else f"{sign} {number(self.target, 4)} {self.unit}"
        return [self.name, value, target, self.verdict]

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, "value": self.value, "target": self.target, "unit": self.unit, "passed": self.passed}


def samples(lines: Sequence[Line]) -> list[Sample]:
    """The runs that succeeded, each with the ceiling around it."""
    return [sample(line, ceiling(lines, k)) for k, line in enumerate(lines) if is_run(line) and not line["exit"]]


def is_run(line: Line) -> bool:
    return line["system"] != DISK


def ceiling(lines: Sequence[Line], index: int) -> float | None:
    """Bytes per second of the nearest disk lines on both sides in the same round: their bytes over their time."""
    here = lines[index]["round"]
    sides = reversed(lines[:index]), iter(lines[index + 1 :])
    rates = []
    for side in sides:
        for line in side:
            if line["round"] == here and not is_run(line) and line.get("mean_read_bytes_per_s"):
                rates.append(line["mean_read_bytes_per_s"])
                break
    return len(rates) / sum(1 / rate for rate in rates) if rates else None


def sample(line: Line, disk: float | None) -> Sample:
    """A run's line in common words. Ours falls back to its own measurement of the disk when there is no other."""
    if line["system"] in (OURS, PACKED):
        read = line["read_bytes_per_token"]
        must = min(read, line["streamed_bytes"]) if line["streamed_bytes"] else read
        disk = disk or line.get("disk_bytes_per_s")
    else:
        read = must = line.get("decode_read_bytes_per_token") or 0
    return Sample(
        system=line["system"],
        batch=line["batch"],
        round=line["round"],
        step_s=line["decode_s_per_token"],
        read_bytes=read,
        ceiling=disk,
        bound_s=must / disk if disk else None,
        load_s=line.get("ready_s", line.get("load_s")),
        prefill_s=line.get("prefill_s"),
        peak_rss_bytes=line.get("peak_rss_bytes"),
        line=line,
    )


def middle(values: Iterable[float | None]) -> float | None:
    """The median of those that are known."""
    known = [value for value in values if value is not None]
    return median(known) if known else None


def over_bound(run: Sample) -> float | None:
    return run.step_s / run.bound_s if run.bound_s else None


def decode_table(lines: Sequence[Line], wanted: Sequence[tuple[str, int]]) -> str:
    """A row for each (system, batch) that was wanted, measured or not: medians over rounds."""
    found = samples(lines)
    header = ["system", "batch", "runs", "s/step", "tokens/s", "GB read/step", "peak RSS, GB"]
    header += ["bound, s/step", "fraction of bound", "prefill, s", "load, s"]
    rows = []
    for system, batch in wanted:
        runs = [run for run in found if (run.system, run.batch) == (system, batch)]
        if not runs:
            tried = sum(line["system"] == system and line.get("batch") == batch for line in lines)
            rows.append([system, str(batch), f"0 of {tried}" if tried else "not measured", *[""] * 8])
            continue
        fractions = [1 / ratio for run in runs if (ratio := over_bound(run))]
        figures: list[tuple[float | None, float]] = [
            (middle(run.step_s for run in runs), 1),
            (middle(batch / run.step_s for run in runs), 1),
            (middle(run.read_bytes for run in runs), 1e9),
            (middle(run.peak_rss_bytes for run in runs), 1e9),
            (middle(run.bound_s for run in runs), 1),
            (middle(fractions), 1),
            (middle(run.prefill_s for run in runs), 1),
            (middle(run.load_s for run in runs), 1),
        ]
        rows.append([system, str(batch), str(len(runs)), *(number(value, 3, scale) for value, scale in figures)])
    return table(header, rows)


def checks(lines: Sequence[Line], *, limit_bytes: int, model_bytes: int) -> list[Check]:
    """The project's figures to reach, each from what was measured."""
    found = samples(lines)

    def pick(system: str, batch: int) -> dict[int, Sample]:
        return {run.round: run for run in found if (run.system, run.batch) == (system, batch)}

    def ratio(above: dict[int, Sample], below: dict[int, Sample], of: Callable[[Sample], float]) -> float | None:
        return middle(of(above[k]) / of(below[k]) for k in above if k in below)

    one, many = pick(OURS, 1), pick(OURS, 32)
    mine = [*one.values()]

    def faster(system: str, batch: int) -> float | None:
        return ratio(pick(system, batch), pick(OURS, batch), lambda run: run.step_s)

    allowed = max(0.0, model_bytes - LIMIT_SHARE * limit_bytes) / 1e9
    every = [run for run in found if run.system == OURS]
    return [
        Check(name="step over the bound, batch 1", value=middle(map(over_bound, mine)), target=1.15),
        Check(name="faster than accelerate, batch 1", value=faster(ACCELERATE, 1), target=3, at_least=True),
        Check(name="faster than llama.cpp mmap, batch 1", value=faster(LLAMACPP, 1), target=3, at_least=True),
        Check(name="faster than AirLLM, batch 1", value=faster(AIRLLM, 1), target=12, at_least=True),
        Check(
            name=f"read per token, batch 1: model - {LIMIT_SHARE} x limit",
            value=middle(run.read_bytes / 1e9 for run in mine),
            target=allowed,
            unit="GB",
        ),
        Check(
            name="tokens/s, batch 32 over batch 1",
            value=ratio(many, one, lambda run: run.batch / run.step_s),
            target=20,
            at_least=True,
        ),
        Check(name="faster than llama.cpp mmap, batch 32", value=faster(LLAMACPP, 32), target=2.5, at_least=True),
        Check(
            name="packed without loss, batch 1",
            value=middle(run.step_s for run in pick(PACKED, 1).values()),
            target=LOSSLESS_S,
            unit="s",
        ),
        Check(name="faster than accelerate, batch 32", value=faster(ACCELERATE, 32), target=None),
        Check(name="step over the bound, batch 32", value=middle(map(over_bound, many.values())), target=None),
        Check(
            name="prefill over a decode step, batch 1",
            value=middle(run.prefill_s / run.step_s for run in mine if run.prefill_s),
            target=1.3,
        ),
        Check(
            name="prefill over a decode step, batch 32",
            value=middle(run.prefill_s / run.step_s for run in many.values() if run.prefill_s),
            target=None,
        ),
        Check(
            name="largest peak RSS, over the limit",
            value=max((run.peak_rss_bytes / limit_bytes for run in every if run.peak_rss_bytes), default=None),
            target=1.0,
        ),
        Check(
            name="most written to disk by a run",
            value=max((run.line["written_bytes"] / 1024 for run in every), default=None),
            target=SCRATCH_KIB,
            unit="KiB",
        ),
    ]


def checks_table(found: Sequence[Check]) -> str:
    return table(["figure", "measured", "target", ""], [check.cells() for check in found])


def same_tokens(lines: Sequence[Line]) -> dict[str, str]:
    """For each other run's system and batch: how many of its first tokens are ours too, as "16 of 16"."""
    ours = {run.batch: run.line["tokens"][0] for run in samples(lines) if run.system == OURS}
    agreed = {}
    for run in samples(lines):
        if run.system != OURS and run.batch in ours and run.line.get("tokens"):
            theirs = run.line["tokens"]
            theirs = theirs[0] if isinstance(theirs[0], list) else theirs
            pairs = zip(ours[run.batch], theirs, strict=False)
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            agreed[f"{run.system}, batch {run.batch}"] = f"{same} of {len(theirs)}"
    return agreed


def doubts(lines: Sequence[Line]) -> list[str]:
    """Why some lines should not be believed: runs that failed, were killed for memory, or had a busy neighbour."""
    said = []
    for line in lines:
        what = f"round {line['round']}, {line['system']}" + (f", batch {line['batch']}" if line.get("batch") else "")
        if line["exit"]:
            said.append(f"{what}: failed with status {line['exit']}")
        if line.get("cgroup", {}).get("oom_kills"):
            said.append(f"{what}: something was killed for memory")
        if line["other_cpu_s"] > DISTURBED * line["wall_s"]:
            said.append(f"{what}: others used {line['other_cpu_s']} s of CPU in {line['wall_s']} s")
    return said


def ceiling_line(lines: Sequence[Line]) -> str:
    """The disk's rate over all rounds, in one sentence."""
    rates = sorted(line["mean_read_bytes_per_s"] / 1e9 for line in lines if line.get("mean_read_bytes_per_s"))
    if not rates:
        return "The disk's ceiling was not measured beside the runs: the bound takes the rate that offload measured."
    span = f"{rates[0]:.2f} to {rates[-1]:.2f}"
    return f"Disk ceiling in the same loop: median {median(rates):.2f} GB/s of {len(rates)} readings, {span}."
