"""The physical lower bound of one pass: no run can be faster than its slowest resource needs for what must move."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Bound:
    """Seconds of one pass by resource. The bound is the largest: a perfect run overlaps the others entirely.

    Attributes:
        disk_s: bytes that must be read over the disk's measured rate.
        link_s: bytes that must be uploaded over the link's rate.
        compute_s: what the units' forwards took, without waiting; measured, so it is a bound of this software.
    """

    disk_s: float = 0.0
    link_s: float = 0.0
    compute_s: float = 0.0

    @property
    def seconds(self) -> float:
        return max(self.disk_s, self.link_s, self.compute_s)

    @property
    def binding(self) -> str:
        """Which resource binds: disk, link or compute."""
        terms = {"disk": self.disk_s, "link": self.link_s, "compute": self.compute_s}
        return max(terms, key=lambda k: terms[k])


def bound(
    *,
    read_bytes: float,
    disk_bytes_per_s: float | None,
    upload_bytes: float = 0,
    link_bytes_per_s: float | None = None,
    compute_s: float = 0.0,
) -> Bound:
    """The bound of a pass that moves so many bytes. A rate of None makes its term 0: unknown, or without limit."""
    return Bound(
        disk_s=read_bytes / disk_bytes_per_s if disk_bytes_per_s else 0.0,
        link_s=upload_bytes / link_bytes_per_s if link_bytes_per_s else 0.0,
        compute_s=compute_s,
    )
