"""Which processor multiplies by the weights that travel: what the user asked for, or what measured rates say."""

from __future__ import annotations

from collections.abc import Sequence

from offload.kernels.chosen import Kernels
from offload.planner.ops import OpCosts
from offload.planner.processors import balanced_share, parse_share
from offload.profile import Profile
from offload.runtime.apart import FEW
from offload.runtime.rates import cpu_rate
from offload.tiers.devices import link_rate
from offload.tiers.layout import Source

LEAST = 0.05  # a smaller share is not worth crossing the link for


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
    profile: Profile | None = None,
) -> float:
    """The share of travelling rows that the CPU multiplies by.

    Where it is not asked for, it is the one with which the CPU and the link finish together, from both their rates:
    those that `offload probe` has measured, of each beside the other, or else what a tenth of a second shows now.

    Args:
        asked: from 0 to 1, or "auto" (None).
        matrices: what linear layers multiply by.
        rows: sequences of a step.
        kernels: the CPU's.
        fits: whether the device holds all weights anyway.
        link_bytes_per_s: of an emulated link; None: measured, where the device has a real one.
        profile: of this machine, where one was measured.

    Raises:
        UsageError: see `parse_share`.
    """
    share = parse_share(asked, device, exact)
    if share is not None:
        return share
    if not matrices or rows > FEW or fits:
        return 0.0
    known = known_rates(profile, matrices, rows, link_bytes_per_s) if profile is not None else None
    if known is None:
        link = link_bytes_per_s if link_bytes_per_s is not None else link_rate(device)
        if link is None:
            return 0.0
        known = cpu_rate(kernels, matrices, rows), link
    share = balanced_share(*known)
    return share if share >= LEAST else 0.0


def known_rates(
    profile: Profile, matrices: Sequence[Source], rows: int, link_bytes_per_s: float | None
) -> tuple[float, float] | None:
    """Bytes of weights per second that the CPU multiplies by and that the link moves, each while the other works.

    None where the profile has no table of the CPU's for such matrices, or no link.
    """
    source = max(matrices, key=lambda s: s.nbytes)
    if (
        profile.source != "measured"
        or source.form is not None
        or (link_bytes_per_s is None and "h2d" not in profile.lanes)
    ):
        return None
    dtype = str(source.dtype).removeprefix("torch.")
    found = OpCosts(profile, "cpu").linear(dtype, dtype, source.shape[0], source.shape[1], rows)
    if found.estimated_s:
        return None
    link = link_bytes_per_s if link_bytes_per_s is not None else profile.lane("h2d").bytes_per_s
    return source.nbytes / found.seconds * profile.kept("cpu", "h2d"), link * profile.kept("h2d", "cpu")
