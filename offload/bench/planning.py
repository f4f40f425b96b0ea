"""`offload bench plan`: predicts every cell of a grid, then measures it, and writes down both in that order.

Fitted cells come first. Their residuals calibrate the machine's profile, which lives in a folder of the benchmark's
own; what the held-out cells will take is then predicted once more, before any of them is measured. Neighbours in the
grid are measured far apart, so that a slow spell of the machine hits all kinds of cells, and when all are done, every
cell is measured again in another process, and once more where the two do not agree: see bench/visits.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from offload.bench.cells import Cell
from offload.bench.checkpoints import make as make_checkpoint
from offload.bench.ledger import Ledger, Line
from offload.bench.regret import CHOSEN, CONTROL, OTHER, turns
from offload.bench.visits import agree, by_cell
from offload.budgets import DEVICE_SLACK, TRANSIT, resolve
from offload.checkpoint.numbers import Numbers, numbers
from offload.errors import OffloadError, UsageError
from offload.hardware import fingerprint, versions
from offload.plan import NEAR, Ask, Plan, SavedPlan, digest, machine, make, save
from offload.planner.search import Candidate
from offload.planner.workspace import LIBRARIES, MARGIN, passing_nbytes, workspace
from offload.profile import learn, own_profile
from offload.specs import Workload
from offload.units import MIB

Progress = Callable[[str, int, int], None]
Trial = Callable[[Mapping[str, Any]], Line]
ROUNDS = 2, 2, 2  # of generating, in each process that visits a cell
SURE = 2  # visits after which a cell is visited again only where they do not agree
ALTERNATIVES = 2  # rejected placements that are measured beside a chosen one
NOT_WORSE_THAN = 1.6  # times the chosen one, by prediction: no measurement is needed to reject what is worse
TIMEOUT_S = 300.0
TRIAL = """
import json, sys
from offload.lean import leave_out
leave_out()
from offload.bench.trial import trial
print(json.dumps(trial(json.loads(sys.argv[1]))))
"""
HOST_BESIDE = 256 * MIB  # main memory beside the weights where a device computes


@dataclass
class PlanBench:
    """One run of the benchmark.

    Attributes:
        cells: what to measure.
        models: name -> sizes of checkpoints to make.
        folder: for checkpoints, profiles and plans; may be used again.
        ledger: what has been done.
        regrets: cells whose rejected alternatives are measured, too.
        effort: of probing.
        trial: measures a cell.
        progress: called with (what is done, cells done, cells in all).
    """

    cells: Sequence[Cell]
    models: Mapping[str, Mapping[str, Any]]
    folder: Path
    ledger: Ledger
    regrets: int = 4
    effort: str = "quick"
    trial: Trial = field(default_factory=lambda: in_a_process)
    progress: Progress = lambda *_: None
    base_nbytes: int = 0
    _outlines: dict[str, Numbers] = field(default_factory=dict)

    def run(self) -> None:
        """All that the ledger has not.

        Raises:
            UsageError: the ledger is of another machine.
        """
        used = {cell.model for cell in self.cells}
        for name in (name for name in self.models if name in used):
            self.progress(f"making {name}", 0, len(self.cells))
            make_checkpoint(self.folder / name, self.models[name])
        self._check()
        for name in (name for name in self.models if name in used):
            if own_profile(self.folder / name) is None:
                self.progress(f"measuring the machine for {name}", 0, len(self.cells))
                _in_python("-m", "offload", "probe", str(self.folder / name), f"--{self.effort}", "--json")
        self._predict_all("predicted", self.cells)
        fitted = [cell for cell in self.cells if not cell.is_held_out]
        held_out = [cell for cell in self.cells if cell.is_held_out]
        for cell in scattered(fitted):
            self._measure(cell, 0)
        self._predict_all("calibrated", held_out)
        for cell in scattered(held_out):
            self._measure(cell, 0)
        for visit in range(1, len(ROUNDS)):
            for cell in scattered(self.cells):
                if visit < SURE or not agree(by_cell(self.ledger.all_of("measured")).get(cell.name, [])):
                    self._measure(cell, visit)
        streaming = [c for c in scattered(self.cells) if self.ledger.of("predicted")[c.name].get("streams")]
        for cell in streaming[: self.regrets]:
            self._measure_alternatives(cell)

    def _check(self) -> None:
        (self.folder / "cache").mkdir(parents=True, exist_ok=True)
        os.environ["OFFLOAD_CACHE"] = str(self.folder / "cache")
        known = self.ledger.all_of("machine")
        if known:
            if known[0]["fingerprint"] != fingerprint():
                raise UsageError(f"{self.ledger.path} was begun on another machine; name another file")
            self.base_nbytes = known[0]["base_nbytes"]
            return
        self.base_nbytes = base_nbytes(self.folder / self.cells[0].model)
        self.ledger.add(
            {
                "kind": "machine",
                "fingerprint": fingerprint(),
                "versions": versions(),
                "base_nbytes": self.base_nbytes,
                "cells": len(self.cells),
            }
        )

    def ask(self, cell: Cell) -> Ask:
        """What a cell asks of the planner: budgets that hold the stated part of the weights, and what a run needs."""
        directory = self.folder / cell.model
        if cell.model not in self._outlines:
            self._outlines[cell.model] = numbers(directory)
        known = self._outlines[cell.model]
        spec, extra, passing = known.spec, known.unpack_nbytes, passing_nbytes(known.spec)
        work = Workload(batch=cell.batch, prompt_tokens=cell.context, total_tokens=cell.context + cell.new_tokens)
        need, kept = workspace(spec, work).nbytes, int(cell.keep * spec.nbytes)
        base = self.base_nbytes + NEAR
        host = base + LIBRARIES
        device = None
        if cell.link is None:
            host += need + kept + extra
        else:
            host += TRANSIT + spec.nbytes + HOST_BESIDE
            device = need + kept + extra + passing + DEVICE_SLACK * sum(1 + len(u.tensors) for u in spec.units)
        budgets = resolve(
            cpu_memory=_up(host / (1 - MARGIN)),
            gpu_memory=None if device is None else _up(device),
            device="cpu" if device is None else "emulated",
        )
        return Ask(
            spec=spec,
            profile=machine(None, directory),
            budgets=budgets,
            work=work,
            link_bytes_per_s=None if cell.link is None else cell.link * 1e9,
            base_nbytes=base,
            extra_nbytes=extra,
        )

    def _predict_all(self, kind: str, cells: Iterable[Cell]) -> None:
        done = self.ledger.of(kind)
        for cell in cells:
            if cell.name not in done:
                self.ledger.add({"kind": kind, "cell": cell.name, **self._predicted(cell)})

    def _predicted(self, cell: Cell) -> Line:
        try:
            plan = make(self.ask(cell), explores=False)
        except OffloadError as error:
            return {"failed": str(error)}
        return predicted(plan)

    def _measure(self, cell: Cell, visit: int) -> None:
        """One process of a cell. The first teaches, where the cell is not held out."""
        lines = self.ledger.all_of("measured")
        done = {(line["cell"], line["visit"]) for line in lines}
        failed = {line["cell"] for line in (*lines, *self.ledger.all_of("predicted")) if "failed" in line}
        if (cell.name, visit) in done or cell.name in failed:
            return
        self.progress(cell.name, len(done) // len(ROUNDS), len(self.cells))
        plan = make(self.ask(cell), explores=False)
        found = self._tried(cell, plan, plan.found.best, "measured", visit)
        if not (visit or cell.is_held_out) and "residuals" in found:
            learn(self.folder / cell.model, found["residuals"])

    def _measure_alternatives(self, cell: Cell) -> None:
        plan = make(self.ask(cell), explores=False)
        best = plan.found.best
        others = [c for c in plan.found.rejected if c.decode.seconds < NOT_WORSE_THAN * best.decode.seconds]
        tried = [(CHOSEN, best), (CONTROL, best), *((OTHER, c) for c in others[:ALTERNATIVES])]
        lines = self.ledger.all_of("alternative")
        done = {(line["cell"], line["plan"], line["role"], line["visit"]) for line in lines}
        for turn, (role, candidate) in turns(tried):
            if (cell.name, candidate.label, role, turn) not in done:
                self.progress(f"{cell.name}: {candidate.label}", len(self.cells), len(self.cells))
                self._tried(cell, plan, candidate, "alternative", turn, role=role)

    def _tried(self, cell: Cell, plan: Plan, chosen: Candidate, kind: str, visit: int, **more: str) -> Line:
        """Runs a cell by a placement of its search, and writes down what came of it."""
        file, measures = self.folder / "cell.plan", kind == "measured"
        saved = SavedPlan(
            version=1, digest=digest(plan.ask.spec), options={}, placement=chosen.placement, work=plan.ask.work
        )
        save(saved, file)
        found = self.trial(
            {
                "cell": cell.name,
                "model": str(self.folder / cell.model),
                "cpu_memory": plan.ask.budgets.cpu_memory,
                "gpu_memory": plan.ask.budgets.gpu_memory,
                "link": plan.ask.link_bytes_per_s,
                "batch": cell.batch,
                "context": cell.context,
                "new_tokens": cell.new_tokens,
                "rounds": ROUNDS[visit if measures else -1],
                "plan": str(file),
                "ledger": str(self.ledger.path) if measures else None,
                "visit": visit,
                "looks_back": measures and not visit,
            }
        )
        self.ledger.reload()
        told = {"plan": chosen.label, "predicted_s": chosen.decode.seconds}
        line = {"kind": kind, "cell": cell.name, "visit": visit, **more, **told, **found}
        self.ledger.add(line)
        return line


def predicted(plan: Plan) -> Line:
    """A plan's prediction, with what simpler models make of the same prices."""
    found = plan.prediction
    return {
        **found.as_dict(),
        "plan": plan.found.best.label,
        "streams": not plan.found.fits,
        "disk_bytes_per_s": plan.ask.profile.lane("read").bytes_per_s if found.read_bytes_per_token else None,
        "budgets": [plan.ask.budgets.cpu_memory, plan.ask.budgets.gpu_memory],
        "sum": {"prefill_s": found.prefill.serial_s, "decode_s_per_token": found.decode.serial_s},
        "max": {"prefill_s": found.prefill.bound.seconds, "decode_s_per_token": found.decode.bound.seconds},
    }


def scattered(cells: Sequence[Cell]) -> list[Cell]:
    """The same in an order in which no two neighbours stay neighbours, the same every time."""
    step = next((s for s in (7, 11, 13, 5) if len(cells) % s), 1)
    return [cells[k * step % len(cells)] for k in range(len(cells))]


def base_nbytes(model: Path) -> int:
    """What a run's process takes before any weight. The first of two may have to compile kernels, which takes more."""
    program = (
        "import sys; from offload.lean import leave_out; leave_out(); from offload.api import load; "
        "print(load(sys.argv[1], cpu_memory='1TiB', device='cpu', context=64, dry_run=True).division.base_nbytes)"
    )
    return min(int(_in_python("-c", program, str(model))) for _ in range(2))


def in_a_process(asked: Mapping[str, Any]) -> Line:
    """A trial in a fresh process; what it failed with, where it did."""
    try:
        return dict(json.loads(_in_python("-c", TRIAL, json.dumps(dict(asked))).splitlines()[-1]))
    except (subprocess.SubprocessError, IndexError, ValueError) as error:
        said = getattr(error, "stderr", None) or str(error)
        return {"failed": str(said).strip().splitlines()[-1][:500]}


def _in_python(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    return done.stdout


def _up(nbytes: float) -> int:
    return -(-int(nbytes) // MIB) * MIB
