"""How fast the threads read and copy main memory, in huge pages and in small ones."""

from __future__ import annotations

import mmap
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from offload.kernels import available
from offload.probes.area import Area
from offload.probes.sampling import Meter
from offload.profile import MemoryRate
from offload.tiers.emulated import move
from offload.units import MIB


@dataclass(frozen=True, kw_only=True)
class MemoryFigures:
    """Rates by threads; a byte that is copied counts once."""

    read: tuple[MemoryRate, ...]
    copy: tuple[MemoryRate, ...]
    small_pages: MemoryRate


def memory(area: Area, meter: Meter) -> MemoryFigures:
    """Reads all of the area and copies its first half to its second, with 1, 2, 4, ... and all threads.

    Where there are no compiled kernels, torch reads (a sum) and copies.
    """
    most = torch.get_num_threads()
    counts = sorted({1 << k for k in range(most.bit_length())} | {most})
    small = _small_pages(min(area.nbytes, 128 * MIB))
    return MemoryFigures(
        read=tuple(read(area, meter, n) for n in counts),
        copy=tuple(copy(area, meter, n) for n in counts),
        small_pages=_read(small, most, meter),
    )


def read(area: Area, meter: Meter, threads: int | None = None) -> MemoryRate:
    """All of the area, by so many threads (default: torch's)."""
    return _read(area.bytes[: area.nbytes // MIB * MIB], threads or torch.get_num_threads(), meter)


def copy(area: Area, meter: Meter, threads: int | None = None) -> MemoryRate:
    """Half of the area to the other half."""
    half = area.nbytes // 2 // MIB * MIB
    return _copy(area.bytes[half : 2 * half], area.bytes[:half], threads or torch.get_num_threads(), meter)


def copies(area: Area, nbytes: int) -> list[Callable[[], object]]:
    """Copies of so many bytes from one half of the area to the other, each in another place, as an emulated link makes
    them.
    """
    half = area.nbytes // 2
    nbytes = min(nbytes, half)
    places = range(0, half - nbytes + 1, nbytes)
    start = area.bytes.data_ptr()
    return [partial(move, start + half + at, start + at, nbytes) for at in places]


def _read(area: torch.Tensor, threads: int, meter: Meter) -> MemoryRate:
    if available()["cpu"] == "yes":
        from offload.kernels.cpu import bandwidth

        sample = meter.time(lambda: bandwidth.read(area, threads))
    else:
        numbers = area.view(torch.float32)
        sample = _with_threads(threads, lambda: meter.time(numbers.sum))
    return MemoryRate(threads, sample.rate(area.numel()), sample.spread)


def _copy(target: torch.Tensor, source: torch.Tensor, threads: int, meter: Meter) -> MemoryRate:
    if available()["cpu"] == "yes":
        from offload.kernels.cpu import bandwidth

        sample = meter.time(lambda: bandwidth.copy(target, source, threads))
    else:
        sample = _with_threads(threads, lambda: meter.time(lambda: target.copy_(source)))
    return MemoryRate(threads, sample.rate(source.numel()), sample.spread)


def _with_threads(threads, run):  # type: ignore[no-untyped-def]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return run()
    finally:
        torch.set_num_threads(before)


def _small_pages(nbytes: int) -> torch.Tensor:
    """Memory as libraries get it: in pages of 4 KiB, where the kernel does not give large ones to everybody."""
    mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        mapping.madvise(mmap.MADV_NOHUGEPAGE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.frombuffer(mapping, dtype=torch.uint8).fill_(1)
