"""The share of updates that an accelerator makes: what a user may say, which are worth trying, and what they take."""

from __future__ import annotations

from offload.errors import UsageError
from offload.finetune.accelerator import Accelerator
from offload.optim.base import Optimizer
from offload.optim.there import why_not_on, why_not_there
from offload.planner.training_steps import UpdateThere
from offload.planner.update_share import balanced_share
from offload.profile import Profile
from offload.tiers.cells import SHARD_COUNT

AUTO = "auto"


def parse_share(
    asked: float | str, *, method: str, has_device: bool, rule: Optimizer, kind: str = "cpu"
) -> float | None:
    """A share, or None where the prediction of a step is to choose it; 0 where it cannot be anything else.

    Args:
        kind: of the accelerator's kernels: cpu, cuda.

    Raises:
        UsageError: one was asked for that cannot be; says why.
    """
    why = why_not_there(rule) or why_not_on(rule, kind)
    if asked == AUTO:
        return None if method == "full" and has_device and why is None else 0.0
    asked = float(asked)
    if not asked:
        return 0.0
    if not has_device:
        raise UsageError(f"update_share={asked:g}: without an accelerator the CPU makes all updates; name a device")
    if method != "full":
        raise UsageError(
            f'update_share={asked:g}: with method={method!r} the CPU makes all updates, which are few; say 0 or "auto"'
        )
    if why is not None:
        other = ", or take adamw" if why_not_there(rule) else ""
        raise UsageError(f'update_share={asked:g}: {why}. Say 0 or "auto"{other}')
    return asked


def likely_shares(rule: Optimizer, profile: Profile, accelerator: Accelerator) -> tuple[float, ...]:
    """Shares that the virtual clock should try beside none: the balance of CPU and link, and some about it."""
    cost = rule.cost
    shard = int(cost.state_bytes * SHARD_COUNT)
    kept = min(profile.kept("h2d", "d2h"), profile.kept("d2h", "h2d")) if accelerator.name != "emulated" else 1.0
    share = balanced_share(
        SHARD_COUNT / cost.seconds(SHARD_COUNT, profile),
        kept * shard / accelerator.crossing_s(shard, profile),
        state=cost.state_bytes,
    )
    return tuple(round(f, 3) for f in (share / 2, share, (1 + share) / 2, 1.0)) if share > 0 else ()


def updates_there_s(step: UpdateThere, rule: Optimizer, profile: Profile, accelerator: Accelerator) -> float:
    """Seconds of a shard's update by the accelerator."""
    params = int(step.nbytes / rule.cost.state_bytes)
    if accelerator.name == "emulated":
        return rule.cost.seconds(params, profile)
    flops, nbytes = rule.cost.flops * params, rule.cost.touched_bytes * params
    return profile.roofline(processor="device", flops=flops, nbytes=nbytes, dtype="float32").seconds


def update_bytes_per_s(rule: Optimizer, profile: Profile) -> float:
    """Bytes of main memory a second that the CPU's updates take at their own rate."""
    return rule.cost.touched_bytes * SHARD_COUNT / rule.cost.seconds(SHARD_COUNT, profile)
