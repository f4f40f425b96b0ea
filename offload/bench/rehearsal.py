"""A short run of a model after its machine was measured: what no probe of single parts sees is learned from it.

Weights that the disk has just written are slower to multiply by than those that have lain in memory, threads that
waited are slow to wake, and requests wait for processors that are busy: such things belong to the whole, and one run
shows them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

from offload.api import load
from offload.bench.trial import expect, observe
from offload.checkpoint import find
from offload.checkpoint.outline import sketch
from offload.hardware import auto_cpu_budget, host_memory, rss_bytes
from offload.planner.workspace import LIBRARIES, MARGIN, workspace
from offload.profile import Look, learn, remember_disk
from offload.profile.learned import WHOLE
from offload.specs import ModelSpec, Workload
from offload.units import GIB, MIB

STREAMED = 0.6  # of the weights, but no more than
STREAMED_NBYTES = 0.75 * GIB  # a pass, so that it takes a third of a second
ROOM = 1.3  # times the weights, so that nothing streams
NEW_TOKENS = 4
WORK = (1, 96), (8, 16)  # batch, tokens of a prompt
ROUNDS = 3  # of both in turn, seconds apart; the first is not learned from: kernels and memory are new to it
LEAST_ROUNDS = 2
SECONDS = 9.0  # of one budget with loading, after which there are no more than the least
MOST_LOADED = 4 * GIB  # of weights that only lie in memory: loading more takes longer than running


def rehearse(model: str | os.PathLike[str], progress: Callable[[str], None] = lambda _: None) -> int:
    """Runs a model with some of its weights streaming and, if it fits, with none; learns from both.

    Returns:
        Runs that were learned from: 0 where there is too little memory for them, or no profile.
    """
    folder = find(model)
    spec = sketch(folder).spec
    count = 0
    for cpu_memory in _budgets(spec):
        progress("a short run")
        count += _rehearse(folder, cpu_memory)
    return count


def _budgets(spec: ModelSpec) -> Iterator[int]:
    most, _ = auto_cpu_budget(host_memory())
    batch, prompt = max(b for b, _ in WORK), max(p for _, p in WORK)
    need = workspace(spec, Workload(batch=batch, prompt_tokens=prompt, total_tokens=prompt + NEW_TOKENS)).nbytes
    beside = rss_bytes() + LIBRARIES + need + 64 * MIB
    streamed = min(STREAMED * spec.nbytes, STREAMED_NBYTES)
    for kept in (spec.nbytes - streamed, ROOM * spec.nbytes):
        cpu_memory = int((beside + kept) / (1 - MARGIN))
        if cpu_memory < most and (kept < spec.nbytes or spec.nbytes < MOST_LOADED):
            yield cpu_memory


def _rehearse(folder: Path, cpu_memory: int) -> bool:
    """One budget; rounds within seconds of each other share their luck, so that all of them are one run."""
    batch, prompt = max(b for b, _ in WORK), max(p for _, p in WORK)
    began = time.monotonic()
    handle = load(
        folder,
        cpu_memory=cpu_memory,
        device="cpu",
        batch=batch,
        context=prompt + NEW_TOKENS,
        prompt_tokens=prompt,
    )
    found: dict[str, list[float]] = {}
    looks: list[Look] = []
    with handle:
        for number, (batch, prompt) in enumerate(WORK * ROUNDS):
            if number >= LEAST_ROUNDS * len(WORK) and time.monotonic() - began > SECONDS:
                break
            work = Workload(batch=batch, prompt_tokens=prompt, total_tokens=prompt + NEW_TOKENS)
            if (rate := handle.measure_disk()) is not None:
                looks.append(Look(round(time.time(), 1), float(round(rate))))
            handle.measure_products()
            prediction, profile = expect(handle, folder, work, remembers=False)
            _, left = observe(handle, prediction, profile, work, is_first=not number)
            if number >= len(WORK):
                for family, value in left.items():
                    found.setdefault(family, []).append(value)
    remember_disk(folder, looks)
    parts = {family: median(values) for family, values in found.items() if family not in WHOLE}  # not calibrated yet
    return learn(folder, parts)
