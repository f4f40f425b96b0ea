"""Wraps a module that is in memory already: it runs with only part of its weights there."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from offload.api.choices import budgets_for, check_counts, ready_kernels, share_for
from offload.budgets import Size, divide
from offload.checkpoint.describe import describe
from offload.errors import ModelError, UsageError
from offload.handle import Offloaded, Progress, start
from offload.io.engine import Engine
from offload.io.extents import Extent
from offload.planner.placement import Tier
from offload.runtime.discovery import dissect
from offload.runtime.session import Session
from offload.specs import ModelSpec, Workload
from offload.tiers.devices import create, full_name, warm_up
from offload.tiers.layout import Piece, Source
from offload.tiers.names import parse_link
from offload.tiers.swap import swap_out
from offload.units import parse_bytes


def wrap(
    module: nn.Module,
    *,
    cpu_memory: Size = None,
    gpu_memory: Size = None,
    resident: Size = None,
    device: str | None = None,
    link: str | float | None = None,
    offload_dir: str | os.PathLike[str] | None = None,
    workspace: str | int = "256MiB",
    slots: int | None = None,
    io: str = "threads",
    cpu_share: float | str | None = None,
    exact: bool = False,
    strict: bool = False,
    progress: Progress | None = None,
    max_memory: Mapping[Any, Size] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
) -> Offloaded:
    """Runs a module that is in memory with only part of its weights there. On exit it is as it was.

    What does not stay is written to a swap file in `offload_dir`, which is unlinked at once, so that nothing remains
    even if the process is killed. Parameters are frozen meanwhile: for inference, not for training.

    Args:
        module: any nn.Module, on the CPU.
        offload_dir: a folder on a fast disk; default: the folder for temporary files. `offload_folder` is the same.
        workspace: memory to set aside for activations.
        cpu_memory: what the process may use from then on; other arguments as for `load`.

    Raises:
        UsageError: it is no module.
        ModelError: the module has no parameters, or they are not on the CPU.
        StorageError: offload_dir is not writable or full; the module is untouched then.
        BudgetError: the budget is too small.
    """
    began = time.perf_counter()
    if not isinstance(module, nn.Module):
        raise UsageError(
            f"wrap takes a torch module that is in memory, but this is a {type(module).__name__}; a folder or hub id "
            "goes to offload.load"
        )
    if not any(True for _ in module.parameters()):
        raise ModelError("the module has no parameters, so there is nothing to offload")
    foreign = sorted({str(p.device) for p in module.parameters() if p.device.type != "cpu"})
    if foreign:
        raise ModelError(f"the module has parameters on {', '.join(foreign)}; move it to the CPU first: module.cpu()")
    check_counts(slots=slots)
    device = full_name(device)
    rate = parse_link(link, device)
    budgets = budgets_for(device, cpu_memory, gpu_memory, resident, max_memory)
    shared = Counter(p.untyped_storage().data_ptr() for p in module.parameters())
    anatomy = dissect(
        module,  # a view of other parameters, or one that is not contiguous, could not be put back as it was
        keep=lambda p: not p.is_contiguous() or shared[p.untyped_storage().data_ptr()] > 1,
    )
    given = {n: o[0].module._parameters[o[0].attribute] for n, o in anatomy.owners.items()}
    parameters = {n: p for n, p in given.items() if p is not None}
    nowhere = {
        n: Piece(Extent("", 0, p.numel() * p.element_size()), p.dtype, 0, p.numel()) for n, p in parameters.items()
    }
    sources = {n: Source(n, p.dtype, tuple(p.shape), (nowhere[n],)) for n, p in parameters.items()}
    config = getattr(module, "config", None)
    spec = describe(anatomy, sources, config if hasattr(config, "get_text_config") else None)
    spec = ModelSpec(units=spec.units, loose=spec.loose, params=spec.params)  # activations are what `workspace` says
    work = Workload(batch=1, prompt_tokens=0, total_tokens=0)
    extra = parse_bytes(workspace, "workspace")
    warm_up(device)
    kernels = ready_kernels(device, sources.values(), anatomy, exact)
    share, on_host = share_for(cpu_share, anatomy, sources, budgets, 1, device, exact, rate, None)
    division = divide(spec, budgets, work, slots=slots, own_nbytes=spec.nbytes, extra_nbytes=extra, cpu_share=share)
    home = division.placement.home
    if any(home[name] is Tier.DISK for name in division.placement.first_rows):  # it is written to disk whole
        division = divide(spec, budgets, work, slots=slots, own_nbytes=spec.nbytes, extra_nbytes=extra)
        home = division.placement.home
    engine = Engine(io, strict=strict)
    try:
        away = {n: p.detach() for n, p in parameters.items() if home[n] is Tier.DISK}
        folder = offload_dir or offload_folder or os.environ.get("TMPDIR") or "/tmp"
        files = {}
        if away:
            written, file = swap_out(away, folder, engine)
            sources |= written
            files[file.path] = file
        where = create(device, memory_nbytes=division.arena_nbytes, link_bytes_per_s=rate)
        placement = division.placement
        session = Session(
            module,
            anatomy,
            sources,
            placement,
            engine,
            where,
            parameters,
            files,
            kernels=kernels,
            host_kernels=on_host,
        )
    except BaseException:
        engine.close()
        raise
    handle = Offloaded(module, session, spec, budgets, division, work, rate)
    handle.checkpoint_nbytes = spec.nbytes
    handle._restore = _Restore(handle, parameters, away)
    del away
    handle._restore.empty()
    start(handle, progress, strict)
    handle.ready_s = time.perf_counter() - began
    return handle


class _Restore:
    """Gives a wrapped module its own parameters back, the same objects with the same values."""

    def __init__(self, handle: Offloaded, parameters: Mapping[str, nn.Parameter], away: Mapping[str, Any]) -> None:
        self._handle, self._parameters = handle, parameters
        self._owners = handle.session.anatomy.owners
        self._away = set(away)

    def empty(self) -> None:
        """Frees the memory of the parameters that were written to disk."""
        for name in self._away:
            self._parameters[name].data = torch.empty(0, dtype=self._parameters[name].dtype)

    def __call__(self) -> None:
        session = self._handle.session
        for name in list(self._away):
            self._parameters[name].data = session.store.whole(name, torch.device("cpu"))
            self._away.discard(name)
        try:
            session.close()
        finally:
            for name, owners in self._owners.items():
                for owner in owners:
                    owner.module._parameters[owner.attribute] = self._parameters[name]
