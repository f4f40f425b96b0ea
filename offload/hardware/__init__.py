"""What this machine has, as facts: memory and the limits on it, cores, GPUs, disks. Nothing is measured here.

No torch; psutil and NVML are imported by the functions that need them. Functions that read /proc or /sys take the
place to read as an argument, so that a test can show them a machine that is not there. What cannot be known is None
or "unknown", never an exception.
"""

from offload.hardware.disks import DiskFacts, disk_of
from offload.hardware.gpus import GpuInfo, gpus, probe_gpus
from offload.hardware.memory import (
    HostMemory,
    auto_cpu_budget,
    host_memory,
    huge_pages,
    peak_rss_bytes,
    reset_peak_rss,
    rss_bytes,
)
from offload.hardware.names import cache_dir, fingerprint, versions
from offload.hardware.processors import CpuInfo, cpu_info

__all__ = [
    "CpuInfo",
    "DiskFacts",
    "GpuInfo",
    "HostMemory",
    "auto_cpu_budget",
    "cache_dir",
    "cpu_info",
    "disk_of",
    "fingerprint",
    "gpus",
    "host_memory",
    "huge_pages",
    "peak_rss_bytes",
    "probe_gpus",
    "reset_peak_rss",
    "rss_bytes",
    "versions",
]
