"""Loads a checkpoint that does not fit: what stays is read, the rest streams."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from offload.api.choices import budgets_for, check_counts, ready_kernels, share_for
from offload.budgets import Division, Size, divide
from offload.checkpoint import find, open_checkpoint
from offload.checkpoint.opening import packed
from offload.errors import UsageError
from offload.handle import Offloaded, Progress, start
from offload.io.engine import Engine
from offload.kernels.chosen import Kernels
from offload.kernels.formats.weights import WeightFormat, parse_weights
from offload.plan.process import remember_process
from offload.plan.saved import adopt, load_plan
from offload.runtime.apart import passing_nbytes
from offload.runtime.linears import is_same_unpacked, unpack_nbytes
from offload.runtime.session import Session, token_check
from offload.specs import Workload
from offload.tiers.devices import create, full_name, warm_up
from offload.tiers.names import parse_link

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
    packs_later: bool = False,
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
        packs_later: matrices stay packed without loss from the first `divide_again` on, so that more of them stay; for
            a model that computes in main memory, is not packed already and not `exact`.
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
    check_counts(batch=batch, context=context, prompt_tokens=prompt_tokens, slots=slots)
    device = full_name(device)
    budgets = budgets_for(device, cpu_memory, gpu_memory, resident, max_memory)
    rate = parse_link(link, device)
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
        packs_later = packs_later and not exact and opened.weights == "none" and budgets.gpu_memory is None
        later_kernels = Kernels("cpu", exact=exact, unpacks=True)  # bits shall not depend on when memory was divided
        later = opened
        if packs_later:
            later = packed(opened, WeightFormat("lossless"), partial(is_same_unpacked, later_kernels))
        kernels = ready_kernels(device, [*opened.sources.values(), *later.sources.values()], opened.anatomy, exact)
        extra = unpack_nbytes(opened.sources.values(), exact)
        saved = load_plan(plan) if plan is not None else None
        if saved is not None:
            cpu_share = 0.5 if saved.placement.first_rows else 0.0  # which rows exactly, the plan says
        share, on_host = share_for(
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
            remember_process(division.base_nbytes, exact)  # the next plan is right where this one has become too large
            division = adopt(saved, spec, division)
        memory = division.arena_nbytes
        if memory is not None and work.pool_tokens:  # which the device itself lends (runtime/pool.py)
            memory += spec.kv_bytes_per_token * (work.pool_tokens + 1)
        where = create(device, memory_nbytes=memory, link_bytes_per_s=rate)
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
    handle._is_strict = strict
    named = any(size is not None for size in (cpu_memory, gpu_memory, max_memory))

    def checked(one: Session, wanted: Workload) -> None:
        if spec.kv_bytes_per_token and named and not wanted.pool_tokens:  # a pool cannot hold more than was planned
            one.before_pass(token_check(opened.model, wanted.kept_tokens, spec.kv_bytes_per_token))

    def another(wanted: Workload, before: Session | None, *, packs: bool) -> tuple[Division, Session]:
        """A session for other work, with memory divided as before the first one was there."""
        now = later if packs else opened
        unpacking = unpack_nbytes(now.sources.values(), exact)
        base = division.base_nbytes
        divided = divide(now.spec, budgets, wanted, slots=slots, extra_nbytes=unpacking, base_nbytes=base)
        files = Engine(io, strict=strict)
        try:
            here = create(device)
            new = Session(
                now.model,
                now.anatomy,
                now.sources,
                divided.placement,
                files,
                here,
                before=before,
                kernels=later_kernels if packs else kernels,
                planned_tokens=wanted.total_tokens,
            )
        except BaseException:
            files.close()
            raise
        checked(new, wanted)
        return divided, new

    if not where.has_memory:
        handle._another, handle._packs = another, packs_later
    if dry_run:
        return handle
    start(handle, progress, strict)
    checked(session, work)
    handle.ready_s = time.perf_counter() - began
    return handle
