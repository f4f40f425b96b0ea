"""How long a step of training takes: its tuple, priced step by step and replayed on the virtual clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from offload.planner.contention import Contention, on_cpu
from offload.planner.schedule import Download, Read, Schedule, Step, Upload, Write
from offload.planner.training import moved
from offload.planner.training_steps import Backward, Forward, Update, UpdateThere
from offload.planner.virtual import Clock
from offload.profile import Profile

STEADY = 6  # steps within which the lanes have settled
BESIDE = (
    "upload",
    "download",
    "update",
    "aside",
)  # lanes that there are with an accelerator only; a pass ends with all


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """One step of training in the long run.

    Attributes:
        seconds: as the clock replays it.
        compute_s: of forward, backward and updates; of the last not, where they run beside an accelerator.
        disk_s: what the disk needs for the bytes that move, reads and writes at once.
        stall_s: the model waits for the disk, or for weights on their way to an accelerator.
        read_bytes, write_bytes: of a step.
        upload_s, download_s: what the link needs in each direction.
        update_s: of updates beside an accelerator.
        aside_s: of updates that it makes itself.
    """

    seconds: float
    compute_s: float
    disk_s: float
    stall_s: float
    read_bytes: int
    write_bytes: int
    upload_s: float = 0.0
    download_s: float = 0.0
    update_s: float = 0.0
    aside_s: float = 0.0

    @property
    def lanes_s(self) -> dict[str, float]:
        """What each has to do."""
        return {
            "compute": self.compute_s,
            "disk": self.disk_s,
            "upload": self.upload_s,
            "download": self.download_s,
            "update": self.update_s,
            "aside": self.aside_s,
        }

    @property
    def bound_s(self) -> float:
        """No step can be shorter."""
        return max(self.lanes_s.values())

    @property
    def binding(self) -> str:
        """What the bound is of."""
        lanes = self.lanes_s
        return max(lanes, key=lambda lane: lanes[lane])

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "step_s": self.seconds,
            "bound_s": self.bound_s,
            "binding": self.binding,
            "compute_s": self.compute_s,
            "disk_s": self.disk_s,
            "stall_s": self.stall_s,
            "read_bytes": self.read_bytes,
            "write_bytes": self.write_bytes,
        } | ({f"{lane}_s": self.lanes_s[lane] for lane in BESIDE} if self.upload_s else {})


def step_cost(
    schedule: Schedule,
    profile: Profile,
    *,
    slots: Mapping[str, int],
    forward_s: Mapping[str, float],
    backward_s: Mapping[str, float],
    update_s: Callable[[Update], float],
    crossing_s: Callable[[int], float] = lambda nbytes: 0.0,
    aside_s: Callable[[UpdateThere], float] = lambda step: 0.0,
    contention: Contention | None = None,
) -> StepCost:
    """Prices and replays a step that repeats.

    Args:
        slots: depth of the rings `state`, `cells` and `device`.
        forward_s, backward_s: unit -> seconds of all micro-batches.
        update_s: seconds of one shard's update.
        crossing_s: seconds in which so many bytes go to an accelerator, or come from it.
        aside_s: seconds of an update that it makes.
        contention: see `replay_step`.
    """

    def seconds(step: Step) -> float:
        if isinstance(step, Forward):
            return forward_s.get(step.unit, 0.0)
        if isinstance(step, Backward):
            return backward_s.get(step.unit, 0.0)
        if isinstance(step, Update):
            return update_s(step)
        if isinstance(step, UpdateThere):
            return aside_s(step)
        if isinstance(step, Read):
            return profile.lane("read").seconds(step.nbytes)
        if isinstance(step, Upload | Download):
            return crossing_s(step.nbytes)
        assert isinstance(step, Write), step
        return profile.lane("write").seconds(step.nbytes)

    return replay_step(schedule, profile, seconds, slots, contention)


def replay_step(
    schedule: Schedule,
    profile: Profile,
    seconds: Callable[[Step], float],
    slots: Mapping[str, int],
    contention: Contention | None = None,
) -> StepCost:
    """Replays a step that repeats.

    Args:
        seconds: what a part of it takes by itself.
        slots: depth of its rings.
        contention: of its lanes; None: that of a CPU which computes.
    """
    sharing = (contention or on_cpu(profile)).sharing(profile, {step.unit for step in schedule})
    keeps = sharing.keeps
    clock = Clock(
        schedule, seconds, slots=slots, sharing=sharing, between_s=profile.cost("step"), joined=BESIDE
    )  # fmt: skip
    found = clock.run(STEADY, stop_when_steady=True)
    read, written = moved(schedule)
    return StepCost(
        seconds=found.pass_s[-1],
        compute_s=clock.work_s("compute"),
        disk_s=both(clock.work_s("read"), clock.work_s("write"), keeps["read"]["write"], keeps["write"]["read"]),
        stall_s=found.stall_s / len(found.pass_s),
        read_bytes=read,
        write_bytes=written,
        **{f"{lane}_s": clock.work_s(lane) for lane in BESIDE},
    )


def mean_cost(costs: Sequence[tuple[StepCost, int]]) -> StepCost:
    """Of steps that alternate: costs, and how often each occurs."""
    count = sum(n for _, n in costs)
    means = {f.name: sum(getattr(cost, f.name) * n for cost, n in costs) / count for f in fields(StepCost)}
    return StepCost(**means | {name: round(means[name]) for name in ("read_bytes", "write_bytes")})


def both(read_s: float, write_s: float, reading: float, writing: float) -> float:
    """Seconds for reads and writes that take so long alone, and keep these parts of their rates beside each other."""
    if read_s * writing <= write_s * reading:  # reads end first
        return write_s + read_s * (1 - writing) / reading
    return read_s + write_s * (1 - reading) / writing
