"""What a plan puts on each tier, by class of tensor: rows that add up to the peak that was predicted."""

from __future__ import annotations

from collections.abc import Mapping

from offload.budgets import Division
from offload.planner.placement import Placement, Tier
from offload.planner.workspace import crossing_nbytes
from offload.specs import ModelSpec, Workload

Classes = dict[str, dict[str, int]]
"""Class of tensor -> tier -> bytes."""


def classes(
    spec: ModelSpec,
    placement: Placement,
    division: Division,
    work: Workload,
    peak_nbytes: int,
    *,
    has_device: bool = False,
    is_emulated: bool = False,
    extra_nbytes: int = 0,
) -> Classes:
    """Bytes by class and tier. On disk, what is read; in memory, what it takes there.

    Args:
        peak_nbytes: of the process: what no class of tensor explains is the process itself, with what passes through
            memory at its fullest moment. An emulated device's memory is in it, too.
        extra_nbytes: what unpacking takes beside the workspace, on every tier that computes.
    """
    kinds: Classes = {"weights": {}, "experts": {}, "embedding": {}}
    kind_of = {}
    for tensor in (*spec.loose, *(t for u in spec.units for t in u.tensors)):
        kind_of[tensor.name] = "embedding" if tensor.is_table else "experts" if tensor.experts else "weights"
        if tensor.name not in placement.first_rows:  # the others travel in part
            on_disk = placement.home[tensor.name] is Tier.DISK
            _add(kinds, kind_of[tensor.name], placement, tensor.name, tensor.read_nbytes if on_disk else tensor.nbytes)
    for tensors in placement.bundles.values():
        for part in tensors:
            if part.name in placement.first_rows:
                on_disk = placement.home[part.name] is Tier.DISK
                _add(kinds, kind_of[part.name], placement, part.name, part.read_nbytes if on_disk else part.nbytes)
    for tensors in placement.host_parts.values():
        for part in tensors:
            _add(kinds, kind_of[part.name.rpartition("[")[0]], placement, part.name, part.nbytes)
    need, where = division.workspace, "device" if has_device else "host"
    kinds["keys and values"] = {where: need.kv}
    kinds["activations"] = {where: need.activations + need.logits}
    rings = (("host", placement.host_ring), ("device", placement.device_ring))
    kinds["buffers"] = {tier: ring.nbytes for tier, ring in rings if ring.slots}
    if crossing := crossing_nbytes(spec, placement.host_parts, work):
        kinds["buffers"]["device"] = kinds["buffers"].get("device", 0) + crossing
    kinds["unpacking"] = {"host": extra_nbytes} | ({"device": extra_nbytes} if has_device else {})
    counted = ("host", "device") if is_emulated else ("host",)
    kinds["process"] = {"host": peak_nbytes - sum(row.get(tier, 0) for row in kinds.values() for tier in counted)}
    return {kind: row for kind, row in kinds.items() if any(row.values())}


def totals(kinds: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """Bytes on each tier."""
    return {tier: sum(row.get(tier, 0) for row in kinds.values()) for tier in tiers_of(kinds)}


def tiers_of(kinds: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Tiers that hold something, fastest first."""
    return [str(tier) for tier in Tier if any(row.get(str(tier)) for row in kinds.values())]


def _add(kinds: Classes, kind: str, placement: Placement, name: str, nbytes: int) -> None:
    row, tier = kinds[kind], str(placement.home[name])
    row[tier] = row.get(tier, 0) + nbytes
