"""How fast a GPU's link is: copies to and from pinned and pageable memory, by size, and both ways at once.

python benchmarks/gpu_links.py        # a table; under half a minute
"""

from __future__ import annotations

from statistics import median
from typing import Any

from report import number, table

MIB = 1 << 20
LINK_BYTES = (64 << 10, MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB, 1024 * MIB)
WAYS = ("up", "down")  # to the device, from the device
SECONDS = 0.4  # for each figure
Rates = dict[str, Any]


def links() -> list[Rates]:
    """Bytes per second for each size, memory and way: the median of several windows. Needs a GPU."""
    import torch

    found = []
    for is_pinned in (True, False):
        for nbytes in LINK_BYTES:
            host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=is_pinned)
            host.fill_(1)
            device = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
            row: Rates = {"nbytes": nbytes, "pinned": is_pinned}
            for way in WAYS:
                pair = (device, host) if way == "up" else (host, device)
                row[f"{way}_bytes_per_s"] = _rate(torch, [pair], nbytes)
            if is_pinned:
                other = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True), torch.empty_like(device)
                row["both_bytes_per_s"] = _rate(torch, [(device, host), other], 2 * nbytes)
                del other
            found.append(row)
            del host, device
    torch.cuda.empty_cache()
    return found


def _rate(torch: Any, pairs: list[tuple[Any, Any]], nbytes: int) -> float:
    """Bytes per second of copies that are queued back to back, each pair on a stream of its own."""
    streams = [torch.cuda.Stream() for _ in pairs]

    def copies(count: int) -> float:
        """Seconds by the GPU's own clock from the first copy to the last."""
        torch.cuda.synchronize()
        begin, ends = torch.cuda.Event(enable_timing=True), []
        begin.record(streams[0])
        for stream, (target, source) in zip(streams, pairs, strict=True):
            stream.wait_event(begin)
            with torch.cuda.stream(stream):
                for _ in range(count):
                    target.copy_(source, non_blocking=True)
                end = torch.cuda.Event(enable_timing=True)
                end.record(stream)
                ends.append(end)
        torch.cuda.synchronize()
        return max(begin.elapsed_time(end) for end in ends) / 1e3

    copies(2)
    windows = 3
    count = max(1, min(500, int(SECONDS / windows / max(1e-6, copies(1)))))
    return count * nbytes / median(copies(count) for _ in range(windows))


def plateau(rates: list[Rates], way: str = "up") -> float | None:
    """The best pinned rate in one direction: what a link can carry."""
    return max((row[f"{way}_bytes_per_s"] for row in rates if row["pinned"]), default=None)


def links_table(rates: list[Rates]) -> str:
    """A row for each size; GB/s."""
    rows = []
    for nbytes in dict.fromkeys(row["nbytes"] for row in rates):
        pinned, pageable = (
            next((row for row in rates if row["nbytes"] == nbytes and row["pinned"] is kind), {})
            for kind in (True, False)
        )
        figures = [pinned.get(f"{way}_bytes_per_s") for way in (*WAYS, "both")]
        figures += [pageable.get(f"{way}_bytes_per_s") for way in WAYS]
        rows.append([f"{nbytes / MIB:g}", *(number(x, 3, 1e9) for x in figures)])
    return table(["MiB", "pinned, up", "pinned, down", "pinned, both", "pageable, up", "pageable, down"], rows)


if __name__ == "__main__":
    print(links_table(links()))
