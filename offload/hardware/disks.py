"""The disk that a path lies on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from offload.hardware.kernel import PROC, SYS, mounts, text_of


@dataclass(frozen=True, kw_only=True)
class DiskFacts:
    path: Path  # what was asked about, or the nearest folder above it that exists
    mount: str  # where its filesystem is mounted
    device: str  # "major:minor" as stat gives it; two paths with the same one share a disk
    filesystem: str  # "ext4", "xfs", "overlay", "tmpfs", ...
    source: str  # what is mounted, often "/dev/..."
    total: int  # bytes
    free: int  # bytes this user may still write
    rotational: bool | None  # None where the kernel does not say


def disk_of(path: str | os.PathLike[str], *, proc: Path = PROC, sys: Path = SYS) -> DiskFacts:
    """The filesystem that holds `path`, or would hold it."""
    here = Path(path).absolute()
    while not here.exists():
        here = here.parent
    number = here.stat().st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    above = [mount for mount in mounts(proc) if here.resolve().is_relative_to(mount.point)]
    above = [mount for mount in above if mount.device == device] or above  # some filesystems number themselves anew
    mount = max(above, key=lambda mount: len(mount.point.parts), default=None)
    block = sys / "dev" / "block" / (mount.device if mount else device)
    spins = text_of(block / "queue" / "rotational") or text_of(block.resolve().parent / "queue" / "rotational")
    space = os.statvfs(here)
    return DiskFacts(
        path=here,
        mount=str(mount.point) if mount else "unknown",
        device=device,
        filesystem=mount.filesystem if mount else "unknown",
        source=mount.source if mount else "unknown",
        total=space.f_blocks * space.f_frsize,
        free=space.f_bavail * space.f_frsize,
        rotational=spins.strip() == "1" if spins.strip() else None,
    )
