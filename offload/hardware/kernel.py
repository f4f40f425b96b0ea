"""What the kernel tells in /proc: texts, tables, mounted file systems, and the control groups of this process."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

PROC, SYS = Path("/proc"), Path("/sys")


@dataclass(frozen=True)
class Mount:
    """A mounted file system, as a line of mountinfo has it."""

    root: PurePosixPath  # the folder of the filesystem that is mounted
    point: Path
    device: str  # "major:minor"
    filesystem: str
    source: str
    options: tuple[str, ...]


def text_of(path: Path) -> str:
    """A file's text; empty where it cannot be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def table_of(text: str) -> dict[str, str]:
    """Lines of "name value" or "name: value"."""
    pairs = (line.replace(":", " ", 1).split(None, 1) for line in text.splitlines())
    return {pair[0]: pair[1].strip() for pair in pairs if len(pair) == 2}


def mounts(proc: Path) -> list[Mount]:
    """Every mounted file system that this process sees."""
    found = []
    for line in text_of(proc / "self" / "mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        fields, rest = left.split(), right.split()
        if len(fields) < 6 or len(rest) < 2:
            continue
        root, point = (re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), field) for field in fields[3:5])
        options = tuple(rest[2].split(",")) if len(rest) > 2 else ()
        found.append(Mount(PurePosixPath(root), Path(point), fields[2], rest[0], rest[1], options))
    return found


def groups(controller: str, proc: Path) -> Iterator[tuple[str, Path]]:
    """("cgroup v2 /path", folder) of every group that can limit this process, from its own up to the root.

    A container may see only part of the hierarchy: a path that lies outside what is mounted starts at the mount.
    """
    mounted = mounts(proc)
    for line in text_of(proc / "self" / "cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        for mount in mounted:
            if mount.filesystem != ("cgroup" if controllers else "cgroup2"):
                continue
            if controllers and controller not in mount.options:
                continue
            try:
                inside = PurePosixPath(path).relative_to(mount.root)
            except ValueError:
                inside = PurePosixPath()
            if ".." in inside.parts:
                inside = PurePosixPath()
            for level in (inside, *inside.parents):
                yield f"cgroup v{1 if controllers else 2} {mount.root / level}", mount.point / level
            break
