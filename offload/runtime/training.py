"""One model in training: walks the step tuple of each pass, with the model as the lane that computes.

`planner/training.py` says when each unit is updated, and what is read and written for it. Entering a unit runs the
steps up to its forward or backward; leaving it, those behind. Every number is the one that a plain loop would have,
wherever weights, gradients and state are meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from offload.kernels.chosen import Kernels
from offload.planner.schedule import Schedule
from offload.planner.training import asides, has_copies
from offload.runtime.backprop import Backprop, Gradients, Loss
from offload.runtime.beside import WalkBeside
from offload.runtime.between_passes import BetweenPasses
from offload.runtime.discovery import Anatomy
from offload.runtime.gradients import GradientSums
from offload.runtime.holdings import Holdings
from offload.runtime.parameters import Parameters
from offload.runtime.timeline import Timeline
from offload.runtime.training_lanes import LOOSE, TrainingLanes
from offload.runtime.training_walk import Rule, Walk
from offload.runtime.tuples import Tuples
from offload.runtime.unit_order import UnitOrder
from offload.runtime.updates_there import ShareThere, UpdatesThere
from offload.tiers.cells import Cells, page
from offload.tiers.device import Device
from offload.tiers.device_cells import DeviceCells
from offload.tiers.devices import CpuDevice
from offload.tiers.spill import Spill
from offload.tiers.statefile import StateFile

EPSILON = 1e-6  # beside the norm, as torch.nn.utils.clip_grad_norm_ has it
TOGETHER = 16  # micro-batches that are evaluated in one pass


@dataclass(frozen=True, slots=True)
class Pass:
    """What one forward and backward pass gave.

    Attributes:
        losses: of every micro-batch.
        grad_norm: global 2-norm before clipping.
        clip: what gradients were, or will be, multiplied by.
    """

    losses: list[float]
    grad_norm: float
    clip: float


class Training:
    """Runs passes and updates.

    Args:
        root: the model; its parameters are replaced while this lives.
        anatomy: its units, from `dissect(root, shares=False)`.
        cells: its weights. Cells that do not stay in memory take turns in a ring.
        state: the optimizer's state on disk.
        spill: gradients and weights of cells that do not stay.
        rule: the optimizer.
        slots: shards of state in memory at a time.
        cell_slots: depth of the ring of cells and bytes of a slot.
        max_grad_norm: gradients whose global norm is larger are scaled down to it; None: no clipping.
        kernels: what computes.
        seed: of random numbers.
        frozen: parameters that are used as they are; all others are in the cells.
        device: where the model computes; None: on the CPU, with the cells as they are.
        there: the cells on it.
        share: what it updates itself.
        overlaps: moving, computing and updating overlap there.
    """

    def __init__(
        self,
        root: nn.Module,
        anatomy: Anatomy,
        cells: Cells,
        state: StateFile,
        spill: Spill,
        rule: Rule,
        *,
        slots: int,
        cell_slots: tuple[int, int] = (0, 0),
        max_grad_norm: float | None,
        kernels: Kernels,
        seed: int,
        frozen: Mapping[str, torch.Tensor] | None = None,
        device: Device | None = None,
        there: DeviceCells | None = None,
        share: ShareThere | None = None,
        overlaps: bool = True,
    ) -> None:
        self.root, self.cells, self.state = root, cells, state
        self._spill, self._rule, self._max_norm = spill, rule, max_grad_norm
        self.timeline = Timeline()
        layouts = cells.layouts.values()
        shapes = {n: (p.dtype, p.shape) for cell in layouts for n, p in cell.places.items()}
        self.device, self._there = device or CpuDevice(), there
        where = self.device.torch_device
        self._parameters = Parameters(anatomy, shapes, frozen or {}, where)
        self._parameters.show(cells.views)
        self._parameters.move_buffers(root)
        self.backprop = Backprop(root, [(u.name, u.module) for u in anatomy.units], self, seed, where)
        self._loose = set(cells.layouts[LOOSE].places) if LOOSE in cells.layouts else set[str]()
        self._sums = GradientSums(there or cells, self._loose, kernels)
        self._lanes = TrainingLanes(state, spill, cells, slots, self.timeline)
        self._lanes.rings.use_cells(*cell_slots)
        parts = (cells, self._lanes, self._parameters, rule, self.timeline)
        self._updates: UpdatesThere | None = None
        if share is not None:
            self._lanes.pin(share.shards)
            self._updates = UpdatesThere(self.device, share, self._lanes, cells, self.timeline)
        beside = {"device": self.device, "overlaps": overlaps, "updates": self._updates}
        self._walk = Walk(*parts) if there is None else WalkBeside(*parts, there=there, **beside)
        clips = max_grad_norm is not None
        copies = has_copies(clips, max(d.itemsize for d, _ in shapes.values()))
        order = [u.name for u in anatomy.units]  # in which units run forward: as they stand, until it is seen
        going_up = share.shards if share is not None else ()
        self._tuples = Tuples(
            cells, self._lanes, order, clips=clips, writes_copies=copies, there=there, going_up=going_up
        )
        self._holdings = Holdings(
            self.backprop, cells, self._lanes, self._walk, self._parameters, spill, self._tuples
        )  # fmt: skip
        self._order = UnitOrder(cells.layouts, self.backprop, self._tuples, self._walk)
        self._between = BetweenPasses(cells, state, self._lanes, self._walk, self._tuples, rule)
        self._micro_batches = 1

    # Start and end.

    def warm_updates(self, numbers: Any) -> None:
        """See UpdatesThere.warm; before weights are there."""
        if self._updates is not None and self._there is not None:
            self._updates.warm(self._there, numbers)

    def create(self, fill: Callable[[Mapping[str, torch.Tensor]], None]) -> None:
        """See BetweenPasses.create."""
        self._between.create(fill)

    def restore(self) -> None:
        """See BetweenPasses.restore."""
        self._between.restore()

    def close(self) -> None:
        """Stops the lanes and gives the model its parameters back."""
        self._lanes.close()
        self.backprop.close()
        self._parameters.close()
        self._sums.close()
        if self._there is not None:
            self._there.close()
        if self._updates is not None:
            self._updates.close()

    # Passes.

    def run(self, losses: Sequence[Loss], scales: Sequence[float], numbers: Callable[[float], Any], step: int) -> Pass:
        """One forward and backward pass of all micro-batches, and the updates that belong into it.

        Args:
            losses, scales: see Backprop.run.
            numbers: makes the optimizer's numbers of this step, given the clip factor.
            step: its number, from 1.

        Raises:
            ModelError: a gradient is not finite, or the model's units run in a way that cannot be trained.
        """
        self._micro_batches = len(losses)
        self._sums.begin()
        if self._max_norm is None:
            self._walk.numbers, self._walk.generation = numbers(1.0), step
        with self._lanes.watched():
            self._order.begin(forward=True, backward=True)
            found = self.backprop.run(losses, scales, step)
            self._order.check(self._parameters.trained, self._loose)
            if self._loose:
                self._sums.finish_loose(LOOSE, self._parameters.trained)
            norm = self._sums.norm(step, found)
            self._order.finish()
        clip = 1.0
        if self._max_norm is not None:
            clip = min(1.0, self._max_norm / (norm + EPSILON))
            self._walk.numbers, self._walk.generation = numbers(clip), step
        return Pass(found, norm, clip)

    def evaluate(self, losses: Sequence[Loss], step: int) -> list[float]:
        """Losses of micro-batches with the present weights."""
        found = []
        for first in range(0, len(losses), TOGETHER):
            with self._lanes.watched():
                self._order.begin(forward=True, backward=False)
                found += self.backprop.run(losses[first : first + TOGETHER], None, step)
                self._order.finish()
        return found

    def flush(self) -> None:
        """Applies every update that is due. The model's parameters are its weights then, where those stay in memory."""
        if self._order.is_due:
            with self._lanes.watched():
                self._order.begin(forward=False, backward=False)
                self._order.finish()
        if self._there is not None:
            self._between.come_down()
            self._parameters.show(self.cells.views)

    def commit(self, extra: Mapping[str, Any]) -> None:
        """Makes the present step the one that a later run finds."""
        self.flush()
        self._between.commit(extra)

    @property
    def weights(self) -> Mapping[str, torch.Tensor]:
        """The present weights by name, brought in as they are asked for; a tensor is good until the next one is."""
        self.flush()
        return self.present

    @property
    def present(self) -> Mapping[str, torch.Tensor]:
        """The same without what is due: cells that stay may hold gradients."""
        return self._between.weights

    # Memory that is left: for what is then not read, or not computed twice.

    def keep_graphs(self, nbytes: int) -> int:
        """See Holdings.keep_graphs."""
        if self._there is not None:
            nbytes = min(nbytes, self._there.spare_nbytes)
        return self._holdings.keep_graphs(nbytes, self._micro_batches)

    def keep_state(self, nbytes: int) -> int:
        """See Holdings.keep_state."""
        return self._holdings.keep_state(nbytes)

    def drop_state(self) -> None:
        """See Holdings.drop_state."""
        self._holdings.drop_state()

    def keep_cells(self, kept: Collection[str], cell_slots: tuple[int, int]) -> None:
        """See Holdings.keep_cells."""
        self._between.come_down()
        order = self._order
        self._holdings.keep_cells(kept, cell_slots, is_due=order.is_due, has_copies=order.has_copies)

    def defer(self, share: float) -> None:
        """Writes a share of the state in the backward pass, where updates wait for the forward pass. No pass is under
        way, and no graphs are kept."""
        self._tuples.defers = share
        self._tuples.forget()
        if self._max_norm is not None:
            largest = max((cell.nbytes for unit, cell in self.cells.layouts.items() if unit != LOOSE), default=0)
            self._lanes.rest()
            self._lanes.rings.use_aside(asides(share, is_beside=self._there is not None), page(largest))

    @property
    def loose(self) -> Collection[str]:
        """Parameters that belong to no unit."""
        return self._loose

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """What is trained."""
        return self._parameters.trained

    @property
    def state_nbytes(self) -> int:
        """Bytes of the optimizer's state, master weights included."""
        return self._holdings.state_nbytes

    @property
    def ring_nbytes(self) -> int:
        return self._lanes.ring_nbytes

    @property
    def staging_nbytes(self) -> int:
        """What cells that travel will take beside their ring, where none has yet."""
        return self._lanes.reads.staging_nbytes

    @property
    def cell_ring_nbytes(self) -> int:
        ring = self._lanes.rings.cells
        return ring.buffer.nbytes if ring is not None else 0

    @property
    def fallbacks(self) -> Sequence[str]:
        """What did not go the fast way, a sentence each."""
        return self.cells.pins.fallbacks

    def schedule(self) -> Schedule:
        """The steps of a step of training, as it will be from the second on."""
        return self._tuples.repeating()

    # The owner's side of Backprop.

    def enter(self, unit: str, *, is_backward: bool) -> None:
        if self.cells.layouts[unit].places:
            self._order.meet(unit, is_backward=is_backward)
            self._walk.enter(unit)
        else:  # it may use parameters of no unit
            self._walk.is_before(unit, is_backward=is_backward)

    def visit(self, unit: str, number: int) -> None:
        """Every micro-batch finds the same weights."""

    def add(self, unit: str, gradients: Gradients) -> None:
        self._sums.add(unit, gradients, is_only=self._micro_batches == 1)

    def leave(self, unit: str, *, is_backward: bool) -> None:
        if not self.cells.layouts[unit].places:
            return
        if is_backward:
            self._order.meet_again(unit)
            if self._micro_batches > 1:
                self._sums.finish(unit)
        self._walk.leave(unit)
