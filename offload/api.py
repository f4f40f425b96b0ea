"""What a user imports: `load` a checkpoint that does not fit, `wrap` a module in memory, or train: `finetuning`."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offload.budgets import Size, divide, from_max_memory, resolve
from offload.checkpoint import find, open_checkpoint
from offload.checkpoint.describe import describe
from offload.checkpoint.pack import PackReport, pack_checkpoint
from offload.errors import ModelError, UsageError
from offload.finetune.finetuning import finetuning
from offload.handle import Offloaded, Progress, start
from offload.io.engine import Engine
from offload.io.extents import Extent
from offload.kernels.chosen import Kernels
from offload.kernels.formats.weights import parse_weights
from offload.plan.saved import adopt, load_plan
from offload.planner.placement import Tier
from offload.probes.probe import probe
from offload.processors import choose_share
from offload.profile import load_profile
from offload.runtime.apart import passing_nbytes
from offload.runtime.discovery import Anatomy, dissect
from offload.runtime.linears import unpack_nbytes
from offload.runtime.session import Session, token_check
from offload.runtime.warmup import compile_kernels
from offload.specs import Budgets, ModelSpec, Workload
from offload.tiers.devices import create, warm_up
from offload.tiers.layout import Piece, Source
from offload.tiers.swap import swap_out
from offload.units import parse_bytes, parse_rate

__all__ = ["finetuning", "load", "pack", "probe", "wrap"]

IGNORED = frozenset({"low_cpu_mem_usage", "offload_state_dict", "use_safetensors", "_fast_init"})  # always so here


def load(
    model: str | os.PathLike[str],
    *,
    cpu_memory: Size = None,
    gpu_memory: Size = None,
    resident: Size = None,
    device: str | None = None,
    link: str | float | None = None,
    dtype: str | torch.dtype = "auto",
    batch: int = 1,
    context: int | None = None,
    prompt_tokens: int | None = None,
    work: Workload | None = None,
    slots: int | None = None,
    io: str = "threads",
    weights: str | None = None,
    cpu_share: float | str | None = None,
    plan: str | os.PathLike[str] | None = None,
    exact: bool = False,
    strict: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    device_map: Any = None,
    max_memory: Mapping[Any, Size] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    torch_dtype: str | torch.dtype | None = None,
    **model_kwargs: Any,
) -> Offloaded:
    """A transformers model from a checkpoint, with as much of it in memory as the budgets allow and the rest streamed.

    Args:
        model: a folder with config.json and safetensors, or a hub id.
        cpu_memory: what the whole process may use, as in "4GiB"; default: what the machine and its cgroup have free.
        gpu_memory: the same for the GPU; default: what it has free.
        resident: how much of the weights stays in memory: "auto", a fraction such as 0.25, or bytes.
        device: cpu, cuda, cuda:N or emulated; default: cuda when there is one.
        link: pace of the emulated device's link, as in "8GB/s".
        dtype: as transformers: "auto", a name or a torch dtype.
        batch, context: memory is set aside for this many sequences of so many tokens (default: 2048, or the model's
            own context if that is less). Where a budget was named, a pass beyond them is refused with BudgetError.
        prompt_tokens: tokens of a sequence that run at once, at most; default: `context`. Generation asks for the last
            token's logits only; a plain forward makes those of all tokens, which come on top.
        work: what memory is set aside for, in place of batch, context and prompt_tokens.
        slots: depth of the rings; 1 turns prefetching off. Default: two, more where slots are small.
        io: I/O backend: threads, uring or aiofiles.
        weights: format of the weights that stay in memory: "none" (as they are), "lossless", "int8" or "int4" (see
            `parse_weights`). A checkpoint made by `pack` has its format already.
        cpu_share: of the weights that live in main memory though the model computes on an accelerator: the share that
            the CPU multiplies by where it lies, instead of sending it; from 0 to 1, or "auto": as measured rates of the
            CPU and the link have it.
        plan: a file that `offload plan -o` wrote for this model: weights are placed as it says.
        exact: compute with torch's own ops only, so that results equal transformers' bit by bit. False takes faster
            kernels, where there are any; sums are in float32, and a result is within a rounding of the exact one.
        strict: a fall-back to something slower is an error.
        dry_run: decide everything, read no weights; the model cannot run.
        progress: called while long work goes on.
        device_map, max_memory, offload_folder, torch_dtype: transformers' spellings; "auto" and None for device_map.
        model_kwargs: handed to transformers, such as attn_implementation.

    Returns:
        A context manager around the model.

    Raises:
        CheckpointError, BudgetError, UsageError, StorageError, StrictError: see offload.errors.
    """
    began = time.perf_counter()
    if device_map not in (None, "auto", "sequential", "balanced"):
        raise UsageError(f'device_map={device_map!r}: only "auto" is understood; say device= and the budgets instead')
    if max_memory is not None:
        sizes = from_max_memory(max_memory)
        cpu_memory = cpu_memory if cpu_memory is not None else sizes.get("cpu_memory")
        gpu_memory = gpu_memory if gpu_memory is not None else sizes.get("gpu_memory")
    device = _named(device)
    budgets = resolve(cpu_memory=cpu_memory, gpu_memory=gpu_memory, resident=resident, device=device)
    rate = _link(link, device)
    kwargs = {k: v for k, v in model_kwargs.items() if k not in IGNORED}
    if progress is not None:
        progress("opening", 0, 0)
    engine = Engine(io, strict=strict)
    try:
        wanted = dtype if torch_dtype is None else torch_dtype
        directory = find(model)
        opened = open_checkpoint(directory, engine, dtype=wanted, weights=parse_weights(weights), **kwargs)
        spec = opened.spec
        if work is None:
            total = context or min(2048, spec.max_tokens or 2048)
            work = Workload(batch=batch, total_tokens=total, prompt_tokens=prompt_tokens or total)
        warm_up(device)
        if progress is not None:
            progress("preparing kernels", 0, 0)
        kernels = _kernels(device, opened.sources, exact)
        extra = unpack_nbytes(opened.sources.values(), exact)
        saved = load_plan(plan) if plan is not None else None
        if saved is not None:
            cpu_share = 0.5 if saved.placement.first_rows else 0.0  # which rows exactly, the plan says
        share, on_host = _share(
            cpu_share, opened.anatomy, opened.sources, budgets, work.batch, device, exact, rate, directory
        )
        division = divide(
            spec,
            budgets,
            work,
            slots=slots,
            extra_nbytes=extra,
            extra_device_nbytes=extra + (passing_nbytes(opened.sources.values()) if share else 0),
            cpu_share=share,
        )
        if saved is not None:
            division = adopt(saved, spec, division)
        where = create(device, memory_nbytes=division.arena_nbytes, link_bytes_per_s=rate)
        parts = opened.model, opened.anatomy, opened.sources
        session = Session(
            *parts,
            division.placement,
            engine,
            where,
            kernels=kernels,
            host_kernels=on_host,
            planned_tokens=work.total_tokens,
        )
    except BaseException:
        engine.close()
        raise
    handle = Offloaded(opened.model, session, spec, budgets, division, work, rate)
    handle.checkpoint_nbytes = opened.checkpoint.nbytes
    handle.weights = opened.weights
    if dry_run:
        return handle
    start(handle, progress, strict)
    if spec.kv_bytes_per_token and (cpu_memory is not None or gpu_memory is not None):
        session.before_pass(token_check(opened.model, work.kept_tokens, spec.kv_bytes_per_token))
    handle.ready_s = time.perf_counter() - began
    return handle


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
        ModelError: the module has no parameters, or they are not on the CPU.
        StorageError: offload_dir is not writable or full; the module is untouched then.
        BudgetError: the budget is too small.
    """
    began = time.perf_counter()
    if not any(True for _ in module.parameters()):
        raise ModelError("the module has no parameters, so there is nothing to offload")
    foreign = sorted({str(p.device) for p in module.parameters() if p.device.type != "cpu"})
    if foreign:
        raise ModelError(f"the module has parameters on {', '.join(foreign)}; move it to the CPU first: module.cpu()")
    if max_memory is not None:
        sizes = from_max_memory(max_memory)
        cpu_memory = cpu_memory if cpu_memory is not None else sizes.get("cpu_memory")
        gpu_memory = gpu_memory if gpu_memory is not None else sizes.get("gpu_memory")
    device = _named(device)
    rate = _link(link, device)
    budgets = resolve(cpu_memory=cpu_memory, gpu_memory=gpu_memory, resident=resident, device=device)
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
    kernels = _kernels(device, sources, exact)
    share, on_host = _share(cpu_share, anatomy, sources, budgets, 1, device, exact, rate, None)
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


def pack(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    weights: str = "lossless",
    io: str = "threads",
    progress: Progress | None = None,
) -> PackReport:
    """Writes a checkpoint with its matrices in fewer bits to a new folder, which `load` takes like any other.

    It is written once and whole: an error, an interrupt or a kill leaves nothing behind.

    Args:
        model: a folder with config.json and safetensors, or a hub id.
        out: a folder that does not exist yet, or an empty one.
        weights: lossless, int8 or int4, see `parse_weights`.
        io: I/O backend: threads, uring or aiofiles.
        progress: called while it goes on.

    Raises:
        CheckpointError, UsageError, StorageError: see offload.errors.
    """
    format = parse_weights(weights)
    if format is None:
        raise UsageError("weights='none' is how the checkpoint is stored already; name lossless, int8 or int4")
    with Engine(io) as engine:
        return pack_checkpoint(find(model), Path(out), format, engine=engine, progress=progress)


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


def _kernels(device: str, sources: Mapping[str, Source], exact: bool) -> Kernels:
    """What computes, ready to run."""
    kernels = Kernels("cuda" if device.startswith("cuda") else "cpu", exact=exact)
    compile_kernels(kernels, sources.values())
    return kernels


def _named(device: str | None) -> str:
    """The device's full name: CUDA devices have a number."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return f"cuda:{torch.cuda.current_device()}" if device == "cuda" and torch.cuda.is_available() else device


def _link(link: str | float | None, device: str) -> float | None:
    """The pace of the emulated device's link, in bytes per second."""
    if link is not None and device != "emulated":
        raise UsageError(f'link={link!r} sets the pace of device="emulated" only; the device is {device}')
    return parse_rate(link, "link") if link is not None else None


def _share(
    asked: float | str | None,
    anatomy: Anatomy,
    sources: Mapping[str, Source],
    budgets: Budgets,
    rows: int,
    device: str,
    exact: bool,
    link: float | None,
    directory: Path | None,
) -> tuple[float, Kernels]:
    """What the CPU multiplies by beside an accelerator, and by which kernels."""
    kernels = Kernels("cpu", exact=exact)
    matrices = [sources[name] for name in sorted(anatomy.linears)]
    if device != "cpu" and not exact:
        compile_kernels(kernels, matrices)
    fits = sum(s.nbytes for s in sources.values()) <= (budgets.gpu_memory or 0)
    share = choose_share(
        asked,
        matrices,
        rows,
        kernels,
        fits=fits,
        device=device,
        exact=exact,
        link_bytes_per_s=link,
        profile=load_profile(directory) if device != "cpu" else None,
    )
    return share, kernels
