"""The machine that a plan is for: this one, as measured or estimated, or another from a file or a preset."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from offload.budgets import GPU_MARGIN
from offload.errors import UsageError
from offload.hardware import cpu_info, host_memory
from offload.planner.ops import OpCosts
from offload.profile import Curve, OpTable, Profile, load_profile, preset
from offload.profile import load as load_file
from offload.specs import Budgets, Products
from offload.units import GIB

MOST_CHANGE = 2.5  # of memory's rate from one process to another: more is a measurement gone wrong
BELIEVED = 2 / 3
"""Of how far a rate is from the profile's, in logarithms: a tenth of a second shows so much of the minute that follows.
What runs took moved by 0.4 to 0.7 of it, minutes after probing; a profile may be older."""


def machine(name: str | os.PathLike[str] | None, model: Path | None = None) -> Profile:
    """A profile: of a file, of a preset, or of this machine: as `offload probe` measured it, else an estimate.

    Raises:
        UsageError: there is no such file and no such preset.
    """
    if name is not None:
        text = os.fspath(name)
        return load_file(text) if text.endswith(".toml") or os.path.sep in text else preset(text)
    return load_profile(model) or _estimate()


def _estimate() -> Profile:
    """This machine, from what is known without measuring: memory and cores, and a desktop's rates."""
    memory, cpu = host_memory(), cpu_info()
    base = preset("cpu-ddr5-nvme4")
    tiers = tuple(replace(t, capacity_nbytes=memory.total) if t.name == "host" else t for t in base.tiers)
    processors = {n: replace(p, cores=cpu.cores or p.cores) for n, p in base.processors.items()}
    note = "this machine was not measured: run offload probe"
    return replace(base, name="not measured", tiers=tiers, processors=processors, notes=(note,))


def budgets_of(profile: Profile, cpu_memory: int | None, gpu_memory: int | None) -> Budgets:
    """Budgets on a machine that is not here: as asked, else what its tiers hold, less what the system takes."""
    host = profile.tier("host").capacity_nbytes
    has_device = any(t.name == "device" for t in profile.tiers)
    if gpu_memory is not None and not has_device:
        raise UsageError(f"gpu_memory was given, but {profile.name} has no accelerator")
    gpu = gpu_memory
    if has_device and gpu is None:
        gpu = max(0, profile.tier("device").capacity_nbytes - GPU_MARGIN)
    return Budgets(
        cpu_memory=cpu_memory if cpu_memory is not None else max(0, host - max(2 * GIB, host // 10)),
        gpu_memory=gpu,
        sources={"cpu_memory": "as asked" if cpu_memory is not None else f"the memory of {profile.name}, less a tenth"},
    )


def with_product_rate(profile: Profile, products: Products, exact: bool = False) -> Profile:
    """The same machine with the memory that a process has just now: what products of one row take of it.

    Products of more rows read as much; what they compute on top takes as long as before. Most of a difference is
    believed, not all of it: see `BELIEVED`.
    """
    ops = OpCosts(profile, "cpu", exact)
    expected = sum(ops.linear(products.dtype, products.dtype, *shape, 1).seconds for shape in products.shapes)
    factor = min(MOST_CHANGE, max(1 / MOST_CHANGE, products.seconds / expected)) ** BELIEVED

    def moved(table: OpTable) -> OpTable:
        if table.processor != "cpu" or table.op not in ("linear", "linear_groups", "decode_attention"):
            return table
        if table.over != "rows":
            return replace(
                table, curve=Curve(tuple(replace(a, seconds=a.seconds * factor) for a in table.curve.anchors))
            )
        one = table.curve.seconds(1)
        anchors = (
            replace(a, seconds=max(factor * one, a.seconds - max(0.0, 1 - factor) * one)) for a in table.curve.anchors
        )
        return replace(table, curve=Curve(tuple(anchors)))

    return replace(profile, ops=tuple(map(moved, profile.ops)))


def with_disk_rate(profile: Profile, bytes_per_s: float | None) -> Profile:
    """The same machine with the rate that its disk has just now: a disk's mood changes more than anything else.

    Most of a difference to a measured rate is believed, not all of it (see `BELIEVED`), and all of one to an estimate.
    How far the rate is from what it was says how far it may change until the run.
    """
    if not bytes_per_s or "read" not in profile.lanes:
        return profile
    lane = profile.lanes["read"]
    is_measured = profile.source == "measured"
    factor = bytes_per_s / lane.bytes_per_s
    moved = min(1.0, abs(factor - 1) / 2) if is_measured else 0.0
    factor **= BELIEVED if is_measured else 1.0
    return replace(profile, lanes={**profile.lanes, "read": lane.times(factor, moved)})
