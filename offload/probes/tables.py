"""From calls that are timed to the table of an op: a curve of seconds over rows, and what it holds for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from offload.kernels.chosen import Kernels
from offload.probes.sampling import Meter, Run
from offload.profile import Curve, OpTable


def ours_and_torchs(
    op: str, rows: Sequence[int], torch_rows: Sequence[int], meter: Meter
) -> list[tuple[Kernels, str, Sequence[int]]]:
    """Who computes an op, by what implementation, and for how many rows it is timed: kernels, if any, and torch."""
    exact = Kernels(meter.device, exact=True)
    found: list[tuple[Kernels, str, Sequence[int]]] = [(exact, exact.choice(op).implementation, torch_rows)]
    fast = Kernels(meter.device, exact=False)
    implementation = fast.choice(op).implementation
    return found if implementation == "torch" else [(fast, implementation, rows), *found]


def curve_of(amounts: Iterable[int], calls: Callable[[int], Iterable[Run]], meter: Meter, scale: float = 1.0) -> Curve:
    """Seconds of one of the calls that are made for each amount.

    Args:
        scale: by how much what is asked for is larger than what is timed.
    """
    points = []
    with torch.no_grad():
        for amount in amounts:
            sample = meter.time(*calls(amount)).scaled(scale)
            points.append((amount, sample.seconds, sample.spread))
    return Curve.of(points)


def table_of(
    op: str, implementation: str, format: str, shape: tuple[int, ...], curve: Curve, meter: Meter, over: str = "rows"
) -> OpTable:
    """The table of what was timed, with the threads that it was timed with."""
    return OpTable(
        op=op,
        implementation=implementation,
        processor="cpu" if meter.device == "cpu" else "device",
        format=format,
        shape=shape,
        over=over,  # type: ignore[arg-type]
        curve=curve,
        threads=torch.get_num_threads() if meter.device == "cpu" else 0,
    )
