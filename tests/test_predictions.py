"""Predictions beside runs that were measured: rates of kernels and disk in, seconds of a token out.

What goes in was measured apart from the runs: products by benchmarks/kernels.py, the disk in the same loop as each run
(what a run read, over its bound). What must come out is in benchmarks/results: decode-cpu, decode-packed and emulated,
all of 2026-11-21. Memory that the process takes by itself is not in those files; it is set so that bytes read agree,
because the subject here is time.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import headers
import pytest

from offload.budgets import divide
from offload.checkpoint.outline import sketch
from offload.kernels.formats.weights import parse_weights
from offload.planner.predict import Computer, Pricer
from offload.profile import CopyRate, Curve, Lane, MemoryRate, OpTable, Processor, Profile, Tier
from offload.specs import Budgets, ModelSpec, Workload
from offload.units import GIB, MIB

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
LLAMA_3B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 3072, "intermediate_size": 8192,
    "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32000,
    "max_position_embeddings": 8192, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
PRODUCTS = {  # GB/s of weights by rows, of 8192 x 3072: benchmarks/results/kernels-cpu-2026-11-21.md
    ("linear", "torch", "bfloat16", 16): {1: 21.4, 2: 22.6, 4: 23.7, 8: 21.6, 16: 18.0},
    ("linear_lossless", "cpu", "lossless", 12.1): {1: 27.4},
}
LAYER_REST_S = {1: 1.5e-4, 8: 2.8e-4, 32: 7e-4}  # a decoder layer without its products, by rows, timed by itself
SOFTWARE = {"unit": 5e-5, "step": 1e-2, "read_submit": 3e-5, "handoff": 1e-5}
BESIDE = 0.8  # of the speed of products that is left while the disk writes to memory


def machine(disk_bytes_per_s: float) -> Profile:
    ops = [
        OpTable(
            op=op, implementation=by, processor="cpu", format=format, shape=(outputs, 3072), over="rows",
            curve=Curve.of((rows, outputs * 3072 * bits / 8 / (rate * 1e9)) for rows, rate in rates.items()),
        )
        for (op, by, format, bits), rates in PRODUCTS.items()
        for outputs in (1024, 8192)
    ]  # fmt: skip
    rest = OpTable(
        op="block", implementation="torch", processor="cpu", format="bfloat16", shape=(3072,), over="rows",
        curve=Curve.of(LAYER_REST_S.items()),
    )  # fmt: skip
    return Profile(
        name="two cores",
        source="measured",
        tiers=(
            Tier(name="host", capacity_nbytes=24 * GIB, processor="cpu", load="read"),
            Tier(name="disk", capacity_nbytes=250 * GIB),
        ),
        lanes={"read": Lane((CopyRate(4 * MIB, 8, disk_bytes_per_s),))},
        processors={"cpu": Processor(flops={"bfloat16": 4.7e11}, memory=(MemoryRate(2, 32.8e9),), cores=2)},
        ops=(*ops, rest),
        costs=SOFTWARE,
        interference={"cpu": {"read": BESIDE}},
    )


def predicted(
    spec: ModelSpec, run: dict[str, float], *, exact: bool, batch: int = 1, link: float | None = None
) -> float:
    """Seconds of a token; `run` has what was read and at which rate."""
    work = Workload(batch=batch, prompt_tokens=32, total_tokens=48)
    device = None if link is None else round(run["device_bytes"])
    budgets = Budgets(cpu_memory=4 * GIB if link is None else 16 * GIB, gpu_memory=device)
    computer = Computer(profile=machine(run["disk_bytes_per_s"]), exact=exact, link_bytes_per_s=link)
    best: tuple[float, float] | None = None
    for base in range(300, 700, 10):
        division = divide(spec, budgets, work, base_nbytes=base * MIB)
        found = Pricer(spec, work, computer).decode(division.placement)
        gap = abs(found.read_bytes + found.upload_bytes - run["moved_bytes"])
        if best is None or gap < best[0]:
            best = gap, found.seconds
    assert best is not None
    assert best[0] < 0.03 * run["moved_bytes"], "no base memory gives the bytes that were moved"
    return best[1]


def decode_runs() -> list[tuple[str, int, dict[str, float]]]:
    """(system, batch, figures) of ours, as their tables have them."""
    cells = []
    for name in ("decode-cpu-2026-11-21.md", "decode-packed-2026-11-21.md"):
        for line in (RESULTS / name).read_text().splitlines():
            row = [cell.strip() for cell in line.strip("|").split("|")]
            if row[0] in ("offload", "offload packed") and row[1].isdigit():
                read, bound = float(row[5]) * 1e9, float(row[7])
                figures = {"seconds": float(row[3]), "moved_bytes": read, "disk_bytes_per_s": read / bound}
                cells.append((row[0], int(row[1]), figures))
    assert len(cells) == 4
    return cells


def emulated_runs() -> list[tuple[float, dict[str, float]]]:
    """(pace of the link, figures) with prefetching."""
    cells = []
    for line in (RESULTS / "emulated-2026-11-21.md").read_text().splitlines():
        row = [cell.strip() for cell in line.strip("|").split("|")]
        if row[0].endswith("GB/s") and row[1] == "on":
            figures = {"seconds": float(row[2]), "moved_bytes": float(row[10]) * 1e9, "device_bytes": 1.51e9}
            cells.append((float(row[0].removesuffix("GB/s")) * 1e9, figures | {"disk_bytes_per_s": 3.2e9}))
    assert len(cells) == 2
    return cells


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """How far each prediction is from what was measured, relative."""
    folder = headers.write(tmp_path_factory.mktemp("m") / "llama", LLAMA_3B)
    plain = sketch(folder).spec
    found = {}
    for system, batch, run in decode_runs():
        is_packed = system == "offload packed"
        spec = packed(plain, sketch(folder, weights=parse_weights("lossless")).spec) if is_packed else plain
        seconds = predicted(spec, run, exact=not is_packed, batch=batch)
        found[f"{system}, batch {batch}, {run['disk_bytes_per_s'] / 1e9:.2f} GB/s"] = seconds / run["seconds"] - 1
    for link, run in emulated_runs():
        seconds = predicted(plain, run, exact=True, link=link)
        found[f"emulated, {link / 1e9:.0f} GB/s"] = seconds / run["seconds"] - 1
    return found


def packed(plain: ModelSpec, made: ModelSpec) -> ModelSpec:
    """As `offload pack` stores it: packed on disk, too, and without room for patches that are not there."""

    def stored(t: Any) -> Any:
        if t.format != "lossless":
            return t
        nbytes = round(t.elements * 1.5)
        return replace(
            t,
            nbytes=nbytes,
            read_nbytes=nbytes,
            slot_nbytes=nbytes + 3 * 4096,
            stored_format="lossless",
            is_packed=True,
        )

    units = tuple(replace(u, tensors=tuple(map(stored, u.tensors))) for u in made.units)
    return replace(plain, units=units)


def test_measured_runs_are_predicted(errors: dict[str, float]) -> None:
    shown = json.dumps({name: f"{error:+.1%}" for name, error in errors.items()}, indent=1)
    assert mean(map(abs, errors.values())) < 0.035, shown
    assert max(map(abs, errors.values())) < 0.06, shown
