"""The NVIDIA GPUs that this process may use, as their driver describes them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class GpuInfo:
    index: int  # among the visible ones, in PCI order: CUDA's number where all cards are alike
    name: str
    total: int  # bytes
    free: int  # bytes, at the time of asking
    uuid: str  # with this a card is found again whatever the order
    pcie_gen: int | None  # the fastest that card and slot agree on
    pcie_width: int | None  # lanes in use

    @property
    def link_bytes_per_s(self) -> float | None:
        """What the PCIe link can carry in one direction, before protocol overhead; None when unknown."""
        if not self.pcie_gen or not self.pcie_width:
            return None
        return {1: 0.25e9, 2: 0.5e9}.get(self.pcie_gen, 0.985e9 * 2.0 ** (self.pcie_gen - 3)) * self.pcie_width


def gpus() -> list[GpuInfo]:
    """The NVIDIA GPUs that this process may use; see probe_gpus for the reason when there are none."""
    return probe_gpus()[0]


def probe_gpus() -> tuple[list[GpuInfo], str]:
    """(GPUs, reason): those that the driver shows and CUDA_VISIBLE_DEVICES leaves; why, when there are none."""
    try:
        import pynvml
    except ImportError:
        return [], "nvidia-ml-py is not installed, so GPUs cannot be asked for"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return [], f"no NVIDIA driver answers ({error})"
    try:
        found = [_gpu(pynvml, index, handle) for index, handle in enumerate(_visible_gpus(pynvml))]
    except pynvml.NVMLError as error:
        return [], f"the NVIDIA driver refused ({error})"
    finally:
        pynvml.nvmlShutdown()
    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    why = "the driver shows no GPU" if asked is None else f"CUDA_VISIBLE_DEVICES={asked!r} leaves none"
    return found, "" if found else why


def _visible_gpus(nvml: Any) -> Iterator[Any]:
    """Handles, in the order of CUDA_VISIBLE_DEVICES; like CUDA, stops at the first entry that names no GPU."""
    count = nvml.nvmlDeviceGetCount()
    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    for name in map(str, range(count)) if asked is None else map(str.strip, asked.split(",")):
        if name.isdecimal() and int(name) < count:
            yield nvml.nvmlDeviceGetHandleByIndex(int(name))
        elif name.startswith(("GPU-", "MIG-")):
            try:
                yield nvml.nvmlDeviceGetHandleByUUID(name)
            except nvml.NVMLError:
                return
        else:
            return


def _gpu(nvml: Any, index: int, handle: Any) -> GpuInfo:
    def link(ask: Any) -> int | None:
        try:
            return int(ask(handle))
        except nvml.NVMLError:  # a slice of a card has no link of its own
            return None

    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    return GpuInfo(
        index=index,
        name=str(nvml.nvmlDeviceGetName(handle)),
        total=int(memory.total),
        free=int(memory.free),
        uuid=str(nvml.nvmlDeviceGetUUID(handle)),
        pcie_gen=link(nvml.nvmlDeviceGetMaxPcieLinkGeneration),
        pcie_width=link(nvml.nvmlDeviceGetCurrPcieLinkWidth),
    )
