"""Which processor multiplies by the weights that travel: what the user asked for, or what measured rates say."""

from __future__ import annotations

from collections.abc import Sequence

from offload.errors import UsageError
from offload.kernels.chosen import Kernels
from offload.planner.processors import balanced_share
from offload.runtime.apart import FEW
from offload.runtime.rates import cpu_rate
from offload.tiers.devices import link_rate
from offload.tiers.layout import Source

LEAST = 0.05  # a smaller share is not worth crossing the link for


def parse_share(asked: float | str | None, device: str, exact: bool) -> float | None:
    """What `cpu_share` means: a number from 0 to 1, or None where rates shall decide.

    Raises:
        UsageError: not such a number; or there is nothing to share; or results shall be exact.
    """
    if asked is None or asked == "auto":
        return 0.0 if exact or device == "cpu" else None
    try:
        share = float(asked)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise UsageError(f'cpu_share={asked!r}: a number from 0 (all on the device) to 1 (all on the CPU), or "auto"')
    if share and device == "cpu":
        raise UsageError(f"cpu_share={asked!r} divides work between the CPU and an accelerator; the device is the CPU")
    if share and exact:
        raise UsageError(f"cpu_share={asked!r} and exact: another processor rounds otherwise; leave one of them out")
    return share


def choose_share(
    asked: float | str | None,
    matrices: Sequence[Source],
    rows: int,
    kernels: Kernels,
    *,
    fits: bool,
    device: str,
    exact: bool,
    link_bytes_per_s: float | None,
) -> float:
    """The share of travelling rows that the CPU multiplies by.

    Where it is not asked for, it is the one with which the CPU and the link finish together, from both their rates.

    Args:
        asked: from 0 to 1, or "auto" (None).
        matrices: what linear layers multiply by.
        rows: sequences of a step.
        kernels: the CPU's.
        fits: whether the device holds all weights anyway.
        link_bytes_per_s: None: measured, where the device has a real link.

    Raises:
        UsageError: see `parse_share`.
    """
    share = parse_share(asked, device, exact)
    if share is not None:
        return share
    if not matrices or rows > FEW or fits:
        return 0.0
    link = link_bytes_per_s if link_bytes_per_s is not None else link_rate(device)
    if link is None:
        return 0.0
    share = balanced_share(cpu_rate(kernels, matrices, rows), link)
    return share if share >= LEAST else 0.0
