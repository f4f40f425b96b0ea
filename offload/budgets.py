"""From what a user says about memory to bytes for weights on each tier, with the arithmetic at hand for a refusal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from offload.errors import BudgetError, UsageError
from offload.hardware import auto_cpu_budget, gpus, host_memory, rss_bytes
from offload.planner.placement import Placement, TooSmall, place
from offload.planner.workspace import LIBRARIES, MARGIN, PASSAGE, Workspace, workspace
from offload.specs import Budgets, ModelSpec, Workload
from offload.units import GIB, MIB, format_bytes, parse_memory

DEVICE_SLACK = 640  # bytes that aligning one tensor costs at most
TRANSIT = PASSAGE  # buffers on the way to a device while memory fills
GPU_MARGIN = 256 * MIB  # context, cuBLAS workspaces and fragmentation
Size = str | int | float | None


def resolve(*, cpu_memory: Size = None, gpu_memory: Size = None, resident: Size = None, device: str = "cpu") -> Budgets:
    """Budgets in bytes; what is not named is taken from the machine, its cgroup and its GPU.

    Raises:
        UsageError: a size or fraction that makes no sense.
    """
    sources = {}
    memory = host_memory()
    if cpu_memory is None:
        cpu, sources["cpu_memory"] = auto_cpu_budget(memory)
    else:
        cpu, sources["cpu_memory"] = parse_memory(cpu_memory, "cpu_memory"), "as asked"
    gpu: int | None = None
    if device.startswith("cuda"):
        if gpu_memory is None:
            index, cards = int(device.partition(":")[2] or 0), gpus()
            if index >= len(cards):
                raise UsageError(f"device={device!r} was asked for, but {_cards(len(cards))}; see offload doctor")
            gpu = max(0, cards[index].free - GPU_MARGIN)
            sources["gpu_memory"] = f"free memory less {format_bytes(GPU_MARGIN)}"
        else:
            gpu, sources["gpu_memory"] = parse_memory(gpu_memory, "gpu_memory"), "as asked"
    elif device == "emulated":
        if gpu_memory is None:
            raise UsageError('device="emulated" needs gpu_memory: how much memory should the device have?')
        gpu, sources["gpu_memory"] = parse_memory(gpu_memory, "gpu_memory"), "as asked, emulated"
    elif gpu_memory is not None:
        raise UsageError(
            f"gpu_memory={gpu_memory!r} was given, but the model would compute on the CPU: no GPU was found, or "
            'device="cpu" was asked for. '
            'Leave it out, or try device="emulated"'
        )
    return Budgets(cpu_memory=cpu, gpu_memory=gpu, resident=parse_resident(resident), sources=sources)


def _cards(count: int) -> str:
    return f"this machine has {count or 'no'} GPU{'s' if count != 1 else ''} that can be used"


def parse_resident(value: Size) -> float | int | None:
    """None and "auto" mean as much as fits; a number up to 1.0 with a point is a fraction; all else is bytes.

    Raises:
        UsageError: a fraction outside 0..1 or not a size.
    """
    if value is None or value == "auto":
        return None
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            return parse_memory(value, "resident")
        value = number if "." in value or number <= 1 else int(number)
    if isinstance(value, float) and 0 <= value <= 1:
        return value
    if isinstance(value, float) and not value.is_integer():
        raise UsageError(
            f'resident={value} is not a fraction; use a number from 0 to 1, a size such as "2GiB", or "auto"'
        )
    return parse_memory(value, "resident")


def from_max_memory(max_memory: Mapping[Any, Size]) -> dict[str, Size]:
    """transformers' max_memory={0: "8GiB", "cpu": "24GiB"} in our names.

    Raises:
        UsageError: a key that is neither "cpu" nor 0.
    """
    unknown = [k for k in max_memory if k not in ("cpu", 0, "disk")]
    if unknown:
        raise UsageError(f"max_memory has {unknown}; known are 0 (the GPU) and 'cpu'")
    names = {"cpu": "cpu_memory", 0: "gpu_memory"}
    return {names[k]: v for k, v in max_memory.items() if k in names}


def _advice(budgets: Budgets, error: TooSmall) -> str:
    """The smallest budget that works; the margin grows with it, and a process is never twice of the same size."""
    if error.is_device and budgets.gpu_memory is not None:
        return f"The smallest gpu_memory that works is {format_bytes(_up(budgets.gpu_memory + error.missing))}."
    needed = (budgets.cpu_memory * (1 - MARGIN) + error.missing) / (1 - MARGIN)
    return f"The smallest cpu_memory that works is about {format_bytes(_up(needed + 4 * MIB))}."


def _up(nbytes: float) -> int:
    """Rounded up to what format_bytes shows, so that the figure can be typed as it is printed."""
    unit = MIB if nbytes < GIB else GIB / 100 if nbytes < 10 * GIB else GIB / 10
    return math.ceil(math.ceil(nbytes / unit) * unit)


@dataclass(frozen=True, kw_only=True)
class Division:
    """Where the memory goes.

    Attributes:
        placement: what follows from it.
        workspace: what the run needs beside weights.
        base_nbytes: the process as it is now, without weights.
        host_nbytes: what is left in main memory for weights and the ring.
        device_nbytes: the same on the device, or None.
        alignment_nbytes: of device memory that aligning those costs at most, beside them.
    """

    placement: Placement
    workspace: Workspace
    base_nbytes: int
    host_nbytes: int
    device_nbytes: int | None
    alignment_nbytes: int = 0

    @property
    def arena_nbytes(self) -> int | None:
        """Device memory that weights and the ring may take, aligned."""
        return None if self.device_nbytes is None else self.device_nbytes + self.alignment_nbytes


def divide(
    spec: ModelSpec,
    budgets: Budgets,
    work: Workload,
    *,
    slots: int | None = None,
    own_nbytes: int = 0,
    extra_nbytes: int = 0,
    extra_device_nbytes: int = 0,
    cpu_share: float = 0.0,
    base_nbytes: int | None = None,
) -> Division:
    """Sets memory aside for the process and the run, and places the weights in the rest.

    Args:
        own_nbytes: weights that are in the process already and will be placed anew (a user's module).
        extra_nbytes, extra_device_nbytes: other memory that the caller knows will be taken; the latter on the device,
            when there is one.
        cpu_share: of what travels to the device: what the CPU multiplies by instead.
        base_nbytes: what the process takes before any weight; None: what this one takes now.

    Raises:
        BudgetError: it cannot fit; says which budget would do.
    """
    base = max(0, rss_bytes() - own_nbytes) if base_nbytes is None else base_nbytes
    need = workspace(spec, work)
    reserve = base + LIBRARIES + int(MARGIN * budgets.cpu_memory) + extra_nbytes
    host = budgets.cpu_memory - reserve
    device: int | None = None
    alignment = DEVICE_SLACK * sum(1 + len(u.tensors) for u in spec.units)
    if budgets.gpu_memory is None:
        host -= need.nbytes
    else:
        device = budgets.gpu_memory - need.nbytes - extra_device_nbytes - alignment
        reserve += TRANSIT
        host -= TRANSIT
    target = budgets.resident
    if isinstance(target, float):
        target = int(target * spec.nbytes)
    if target is not None and device is not None:
        target = max(0, target - device)
    try:
        placement = place(
            spec, host_nbytes=host, device_nbytes=device, slots=slots, host_target=target, cpu_share=cpu_share
        )
    except TooSmall as error:
        gpu = f" and gpu_memory={format_bytes(budgets.gpu_memory)}" if budgets.gpu_memory is not None else ""
        where = "on the device" if device is not None else "of it"
        raise BudgetError(
            f"cpu_memory={format_bytes(budgets.cpu_memory)}{gpu} is too small for this run. The process itself takes "
            f"{format_bytes(base)}, libraries and margin {format_bytes(reserve - base)}; the run needs "
            f"{format_bytes(need.nbytes)} {where} ({need.explain()}) for {work.batch} sequence"
            f"{'s' if work.batch != 1 else ''} of {work.total_tokens} tokens. {error} {_advice(budgets, error)}"
        ) from None
    return Division(
        placement=placement,
        workspace=need,
        base_nbytes=base,
        host_nbytes=host,
        device_nbytes=device,
        alignment_nbytes=alignment,
    )
