"""What the schedule of training consists of: its steps, and the units and shards that they are about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from offload.planner.schedule import Aside, Compute, Download, Read, Upload, Write

What = Literal["gradient", "weights", "masters", "nothing"]
Made = Literal["update", "trial", "rounding"]
Part = Literal["all", "here", "there"]  # of a cell: shards that the CPU updates, or the accelerator


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadShard(Read):
    """Reads the optimizer's state of a shard; takes a slot of the state's ring."""

    shard: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadCell(Read):
    """Brings a unit's gradient or weights, or takes room for what will come; takes a slot of the cells' ring."""

    what: What


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward(Compute):
    """The forward of the unit, of all micro-batches. If it is the pass's last, its cell stays for the backward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backward(Compute):
    """The backward of the unit, of all micro-batches: the gradient takes the place of the weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Update(Compute):
    """The optimizer's step of one shard: gradient and state become weights and state.

    Attributes:
        made: "trial": only the weights are wanted, and the slot with the state is dropped, since the update will be
            made again; "rounding": the state is up to date, and the weights are made of it.
        goes_aside: the weights go to memory beside the cell, which keeps the gradient.
    """

    shard: str
    made: Made = "update"
    goes_aside: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteShard(Write):
    """Writes the state of a shard back."""

    shard: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteCell(Write):
    """Writes a unit's gradient, or its weights."""

    what: What


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadCell(Upload):
    """Copies a unit's cell to the accelerator.

    Attributes:
        shards: of it that go; none: all.
    """

    shards: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadCell(Download):
    """Brings a unit's cell down: gradients, and weights that were updated there.

    Attributes:
        shards: of it that come; none: all.
    """

    shards: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadShard(Upload):
    """Brings the optimizer's state of a shard to the accelerator; takes a slot of the state's ring there."""

    shard: str


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateThere(Aside):
    """The optimizer's step of one shard, by the accelerator, on the gradient and the state that it has."""

    shard: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadShard(Download):
    """Brings the state back to where it came from."""

    shard: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedShard:
    """What the optimizer updates at a time.

    Attributes:
        nbytes: of its state.
        masters_nbytes: of the part of it that holds the float32 weights.
        stays: the state is kept in memory.
        goes_up: the accelerator updates it; otherwise, the CPU.
        cell_nbytes: of its weights, and of its gradient, in the model's dtype; of those that go up.
    """

    name: str
    nbytes: int
    masters_nbytes: int
    stays: bool = False
    goes_up: bool = False
    cell_nbytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedUnit:
    """A unit, or what belongs to none.

    Attributes:
        nbytes: of its cell: of its weights, and of its gradient.
        stays: the cell is kept in memory.
        uploads: it computes on an accelerator with memory of its own.
        stays_there: and has a place of its own there, from its forward to its backward.
        defers: where updates wait for the forward pass, its state is written in the backward pass.
    """

    name: str
    nbytes: int
    shards: tuple[TrainedShard, ...] = ()
    stays: bool = True
    uploads: bool = False
    stays_there: bool = False
    defers: bool = False

    @property
    def rests_there(self) -> bool:
        """What the accelerator updates of its cell need not cross the link: main memory has a place for the rest."""
        return self.stays and self.stays_there

    @property
    def going_up(self) -> tuple[TrainedShard, ...]:
        """Shards that the accelerator updates. A second update in the backward pass is for the CPU only."""
        if not self.uploads or (self.defers and not self.stays):
            return ()
        return tuple(s for s in self.shards if s.goes_up)

    @property
    def masters_nbytes(self) -> int:
        """What reading its masters moves."""
        return sum(s.masters_nbytes for s in self.shards if not s.stays)
