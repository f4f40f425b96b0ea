"""Reads a bundle into one area of memory and assembles it there."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from offload.io.engine import Engine, File
from offload.tiers.futures import join
from offload.tiers.host import as_tensor
from offload.tiers.layout import Layout, assemble


def read_bundle(
    layout: Layout,
    view: memoryview,
    engine: Engine,
    opened: Callable[[str], File],
    priority: int = 0,
    staging: memoryview | None = None,
) -> Future[int]:
    """Starts reading; done when the bundle's tensors can be used.

    Args:
        layout: what comes from where.
        view: `layout.nbytes`: the final part first, staging behind it, which the I/O thread that reads last assembles.
        opened: gives the open file of a path.
        staging: where that part is elsewhere.
    """
    final, beside = view, view[layout.final_nbytes : layout.nbytes] if staging is None else staging
    finish = None
    if layout.copies or layout.edges:
        target = as_tensor(view[: layout.final_nbytes])

        def finish() -> None:
            for at, to, nbytes in layout.edges:
                final[to : to + nbytes] = beside[at : at + nbytes]
            assemble(layout, target, as_tensor(beside))

    files = [opened(op.path) for op in layout.reads]  # what can fail comes before anything is in flight
    parts = []
    for file, op in zip(files, layout.reads, strict=True):
        views = [(beside if to.is_staging else final)[to.at : to.at + to.nbytes] for to in op.targets]
        parts.append(engine.read(file, op.offset, views, need=op.need, priority=priority))
    return join(parts, finish)
