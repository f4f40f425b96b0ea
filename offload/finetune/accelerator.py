"""The accelerator of a training run: which one computes, and what of its memory cells may take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from offload.errors import BudgetError
from offload.finetune.room import backward_nbytes, step_nbytes
from offload.planner.cells import FEWEST, CellPlan, plan_cells
from offload.planner.contention import Contention, beside_card, on_cpu
from offload.profile import Profile
from offload.runtime.training_lanes import LOOSE
from offload.specs import ModelSpec
from offload.tiers.cells import Cell, page
from offload.tiers.device import Device
from offload.tiers.device_cells import DeviceCells
from offload.tiers.device_state import SLOTS
from offload.tiers.devices import create
from offload.units import format_bytes

GRADIENTS = 3  # of the largest unit, beside its cell: as autograd gives it, in 16 bits, and its sum in 32
UNKNOWN = 0.25  # of the memory: for activations of a model that nobody can say anything of


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """What a user asks for.

    Attributes:
        name: emulated, cuda:N.
        memory: bytes of its memory.
        link_bytes_per_s: pace of an emulated one's link; None: as fast as memory copies go.
        overlaps: moving, computing and updating overlap.
        activations: purpose -> bytes of a micro-batch, beside weights and gradients; None: unknown.
        state_nbytes: of slots for optimizer state that is updated there.
        device: it, where it is open already and has room for every cell; None: `open` makes it.
    """

    name: str
    memory: int
    link_bytes_per_s: float | None = None
    overlaps: bool = True
    activations: Mapping[str, int] | None = field(default=None)
    state_nbytes: int = 0
    device: Device | None = None

    @property
    def kind(self) -> str:
        """Of its kernels: cpu, cuda."""
        return "cuda" if self.name.startswith("cuda") else "cpu"

    @property
    def host_nbytes(self) -> int:
        """What of its memory is the process's own."""
        return self.memory if self.name == "emulated" else 0

    @property
    def processor(self) -> str:
        """What profiles call what computes."""
        return "cpu" if self.name == "emulated" else "device"

    def sized(self, spec: ModelSpec, tokens: int) -> Accelerator:
        """With what activations take there: inputs of units as far as those of one micro-batch.

        Args:
            tokens: of a micro-batch.
        """
        return replace(self, activations=step_nbytes(spec, tokens) | backward_nbytes(spec, tokens))

    def updating(self, shard_nbytes: int) -> Accelerator:
        """The same that updates a part of the shards itself, whose state takes so many bytes at most."""
        return replace(self, state_nbytes=SLOTS * shard_nbytes)

    def inputs_nbytes(self) -> int:
        """What inputs of units may take there between forward and backward; those of more micro-batches go ashore."""
        if self.activations is None:
            return int(UNKNOWN * self.memory) // 2
        return self.activations["inputs of units"]

    def is_known(self, profile: Profile) -> bool:
        """Whether a profile has what a prediction needs."""
        return self.name == "emulated" or {"h2d", "device"} <= {*profile.lanes, *profile.processors}

    def crossing_s(self, nbytes: int, profile: Profile) -> float:
        """Seconds in which so many bytes cross the link, either way."""
        if self.name != "emulated":
            return profile.lane("h2d").seconds(nbytes)
        copying = profile.processors["cpu"].bytes_per_s / 2  # read and written
        return nbytes / min(copying, self.link_bytes_per_s or copying)

    def contention(self, profile: Profile, update_bytes_per_s: float) -> Contention:
        """What its lanes and the CPU's updates take from each other. An emulated one updates with the CPU, too."""
        if self.name != "emulated":
            return beside_card(profile, update_bytes_per_s)
        demand = {"update": update_bytes_per_s, "aside": update_bytes_per_s}
        return replace(on_cpu(profile), demand=demand, capacity=update_bytes_per_s)

    def open(self, layouts: Sequence[Cell]) -> tuple[Device, DeviceCells]:
        """The device, and room for cells on it.

        Raises:
            BudgetError: its memory is too small; says what would do.
            UsageError: there is no such device.
        """
        if self.device is not None:
            sizes = {cell.unit: page(cell.nbytes) for cell in layouts}
            return self.device, DeviceCells({cell.unit: cell for cell in layouts}, self.device, all_there(sizes))
        sizes = {cell.unit: page(cell.nbytes) for cell in layouts}
        plan = plan_there(sizes, self)
        memory = plan.nbytes + self.state_nbytes
        device = create(self.name, memory_nbytes=memory, link_bytes_per_s=self.link_bytes_per_s)
        try:
            there = DeviceCells({cell.unit: cell for cell in layouts}, device, plan)
            there.spare_nbytes = self.memory - plan.nbytes - sum(beside_there(sizes, self).values())
            return device, there
        except BaseException:
            device.close()
            raise


def all_there(cells: Mapping[str, int]) -> CellPlan:
    """Every cell has a place of its own on the device."""
    return plan_cells(cells, sum(cells.values()))


def beside_there(cells: Mapping[str, int], asked: Accelerator) -> dict[str, int]:
    """What a step takes there beside cells and their ring, by purpose."""
    sizes = dict(cells)
    loose = sizes.pop(LOOSE, 0)
    parts = asked.activations if asked.activations is not None else {"activations": int(UNKNOWN * asked.memory)}
    found = {
        "gradients of the largest part of the model": GRADIENTS * max(sizes.values(), default=0),
        "gradients of parameters that several parts use": GRADIENTS * loose,
        "optimizer state that is updated there": asked.state_nbytes,
    } | dict(parts)
    return {name: nbytes for name, nbytes in found.items() if nbytes}


def classes_there(cells: Mapping[str, int], plan: CellPlan, asked: Accelerator) -> dict[str, int]:
    """What a step takes there by class, with cells as they are planned."""
    ring = plan.slots * plan.slot_nbytes
    largest = max((nbytes for unit, nbytes in cells.items() if unit != LOOSE), default=0)
    return {
        "weights": plan.nbytes - ring,
        "optimizer": asked.state_nbytes,
        "gradients": GRADIENTS * (largest + cells.get(LOOSE, 0)),
        "activations": sum((asked.activations or {}).values()),
        "buffers": ring,
    }


def plan_there(cells: Mapping[str, int], asked: Accelerator) -> CellPlan:
    """Which cells have a place of their own in the device's memory, and the ring for the others.

    A cell with a place is uploaded once a step, the others twice.

    Args:
        cells: unit -> bytes.

    Raises:
        BudgetError: not even the ring fits beside what a micro-batch takes.
    """
    beside, sizes = beside_there(cells, asked), dict(cells)
    loose = sizes.pop(LOOSE, 0)
    largest = max(sizes.values(), default=0)
    needed = sum(beside.values()) + loose
    try:
        plan = plan_cells(sizes, asked.memory - needed)
    except BudgetError:
        ring = FEWEST * largest
        needed += ring
        if asked.activations is None:
            needed = int((needed - beside["activations"]) / (1 - UNKNOWN)) + 1
        raise BudgetError(
            f"gpu_memory={format_bytes(asked.memory)} is too small for this training, which takes there: "
            + ", ".join(f"{name} {format_bytes(nbytes)}" for name, nbytes in beside.items())
            + (f", those parameters {format_bytes(loose)}" if loose else "")
            + f", and {FEWEST} slots for the largest part of the model {format_bytes(ring)}. "
            f"Give at least {format_bytes(needed)}, or shorter micro-batches"
        ) from None
    return replace(plan, kept=plan.kept | {LOOSE}, nbytes=plan.nbytes + loose)
