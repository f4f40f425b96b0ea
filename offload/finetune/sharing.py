"""What a user may say of the share of updates that an accelerator makes."""

from __future__ import annotations

from offload.errors import UsageError
from offload.optim.base import Optimizer
from offload.optim.there import why_not_there

AUTO = "auto"


def parse_share(asked: float | str, *, method: str, has_device: bool, rule: Optimizer) -> float | None:
    """A share, or None where the prediction of a step is to choose it; 0 where it cannot be anything else.

    Raises:
        UsageError: it is no share, or one was asked for that cannot be; says why.
    """
    if asked == AUTO:
        return None if method == "full" and has_device and why_not_there(rule) is None else 0.0
    if isinstance(asked, str) or not 0 <= asked <= 1:
        raise UsageError(f'update_share={asked!r}: give "auto" or a share of the updates from 0 to 1')
    if not asked:
        return 0.0
    if not has_device:
        raise UsageError(f"update_share={asked:g}: without an accelerator the CPU makes all updates; name a device")
    if method != "full":
        raise UsageError(
            f'update_share={asked:g}: with method={method!r} the CPU makes all updates, which are few; say 0 or "auto"'
        )
    if (why := why_not_there(rule)) is not None:
        raise UsageError(f'update_share={asked:g}: {why}. Say 0 or "auto", or take adamw')
    return float(asked)
