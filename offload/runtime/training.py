"""One model in training: its cells, the lane of its optimizer's state, and when each unit is updated.

With a clip norm, the factor is known only when the last gradient is. So a unit is updated just before its next use, in
the forward pass of the next step, while the disk brings the state of those behind it. Without one, a unit is updated as
soon as its gradient is there, in the backward pass. Either way every number is the one a plain loop would have.

    clip:     forward  | update embed, run it | update block 0, run it | ...      backward  | ... | block 0 | embed |
    no clip:  forward  | embed | block 0 | ...      backward  | ... | block 0, update it | embed, update it |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from offload.errors import ModelError
from offload.kernels.chosen import Kernels
from offload.runtime.backprop import Backprop, Gradients, Loss
from offload.runtime.discovery import Anatomy
from offload.runtime.shards import ShardLane
from offload.runtime.timeline import Timeline, now
from offload.tiers.cells import Cells, Shard
from offload.tiers.host import as_tensor
from offload.tiers.statefile import StateFile

LOOSE = "(loose)"
EPSILON = 1e-6  # beside the norm, as torch.nn.utils.clip_grad_norm_ has it


class Rule(Protocol):
    """An optimizer, as far as it is needed here; see offload.optim."""

    def state_nbytes(self, shape: tuple[int, ...]) -> int: ...
    def start(self, state: torch.Tensor, weights: torch.Tensor) -> None: ...
    def step(self, state: torch.Tensor, cell: torch.Tensor, numbers: Any, *, decays: bool) -> None: ...
    def weights(self, state: torch.Tensor, cell: torch.Tensor) -> None: ...


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
        anatomy: its units, from `dissect(root, shares=True)`.
        cells: its weights.
        state: the optimizer's state on disk.
        rule: the optimizer.
        slots: shards of state in memory at a time.
        max_grad_norm: gradients whose global norm is larger are scaled down to it; None: no clipping.
        kernels: what computes.
        seed: of random numbers.
        frozen: parameters that are used as they are; all others are in the cells.
    """

    def __init__(
        self,
        root: nn.Module,
        anatomy: Anatomy,
        cells: Cells,
        state: StateFile,
        rule: Rule,
        *,
        slots: int,
        max_grad_norm: float | None,
        kernels: Kernels,
        seed: int,
        frozen: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self.root, self.cells, self.state = root, cells, state
        self._rule, self._slots, self._max_norm, self._kernels = rule, slots, max_grad_norm, kernels
        self.timeline = Timeline()
        self._anatomy, self._frozen = anatomy, dict(frozen or {})
        self._bound: list[tuple[nn.Module, str, nn.Parameter | None]] = []
        self._bind()
        units = [(u.name, u.module) for u in anatomy.units]
        self.backprop = Backprop(root, units, self, seed)
        self._loose = set(cells.layouts[LOOSE].places) if LOOSE in cells.layouts else set[str]()
        self._shards = {shard.name: shard for cell in cells.layouts.values() for shard in cell.shards}
        self._nbytes = {name: state.nbytes(name) for name in self._shards}
        self._lane = self._make_lane(list(cells.layouts))
        self._order: list[str] = []  # cells in the order of their updates; empty before the first pass
        self._due: set[str] = set()  # cells that hold a gradient
        self._numbers: Any = None
        self._generation = 0
        self._micro_batches = 1
        self._sums: dict[str, torch.Tensor] = {}
        self._squares: dict[str, float] = {}
        self._seen: set[str] = set()  # units whose backward has run in this pass

    # Start and end.

    def create(self) -> None:
        """Makes the state of step 0 out of the weights in the cells and commits it."""

        def make(name: str, view: memoryview) -> None:
            as_tensor(view)[self._rule.state_nbytes(self._shards[name].shape) :].zero_()
            self._rule.start(self._state_of(name, view), self._cell(name))

        self._lane.fill(make, 0)
        self.state.commit(0, {})

    def restore(self) -> None:
        """Reads the committed state, checks all of it, and puts its weights into the cells."""
        self._lane.look(lambda name, view: self._rule.weights(self._state_of(name, view), self._cell(name)))
        self._generation = self.state.step

    def close(self) -> None:
        """Stops the lane and gives the model its parameters back."""
        self._lane.close()
        self.backprop.close()
        for module, attribute, parameter in self._bound:
            module._parameters[attribute] = parameter
        self._bound.clear()
        self._sums.clear()

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
        self._squares.clear()
        self._seen.clear()
        if self._max_norm is None:
            self._numbers, self._generation = numbers(1.0), step
        found = self.backprop.run(losses, scales, step)
        self._learn_order()
        self._check_uses()
        if self._loose:
            self._finish_loose()
        norm = math.sqrt(math.fsum(self._squares.values()))
        if not math.isfinite(norm):
            raise ModelError(f"the gradient of step {step} is not finite (its norm is {norm}); losses were {found}")
        clip = 1.0
        if self._max_norm is not None:
            clip = min(1.0, self._max_norm / (norm + EPSILON))
            self._numbers, self._generation = numbers(clip), step
        return Pass(found, norm, clip)

    def evaluate(self, losses: Sequence[Loss], step: int) -> list[float]:
        """Losses of micro-batches with the present weights, one after the other."""
        return [self.backprop.run([loss], None, step)[0] for loss in losses]

    def flush(self) -> None:
        """Applies every update that is due."""
        for unit in self._order:
            self._update(unit)

    def commit(self, extra: Mapping[str, Any]) -> None:
        """Makes the present step the one that a later run finds."""
        self.flush()
        self._lane.write_kept(self._generation)
        self.state.commit(self._generation, extra)

    # Memory that is left: for what is then not read, or not computed twice.

    def keep_graphs(self, nbytes: int) -> int:
        """Keeps the graphs of as many units as fit, the last ones first; returns the bytes that they take."""
        taken = 0
        for unit in reversed(self.backprop.order):
            part = self.backprop.parts[unit]
            is_last = unit == self.backprop.order[-1]  # its backward follows at once: its graph is there anyway
            need = 0 if is_last else part.graph_nbytes * self._micro_batches
            part.keeps = taken + need <= nbytes
            taken += need if part.keeps else 0
        return taken

    def keep_state(self, nbytes: int) -> int:
        """Keeps as many shards in memory as fit, spread evenly; returns the bytes that they take."""
        names = [s.name for unit in self._order for s in self.cells.layouts[unit].shards]
        total = sum(self._nbytes.values())
        share = min(1.0, nbytes / max(1, total))
        taken = wanted = 0.0
        for name in names:
            wanted += self._nbytes[name] * share
            if taken + self._nbytes[name] / 2 <= wanted and taken + self._nbytes[name] <= nbytes:
                self._lane.keep(name)
                taken += self._nbytes[name]
        return int(taken)

    @property
    def state_nbytes(self) -> int:
        """Bytes of the optimizer's state, master weights included."""
        return sum(self._nbytes.values())

    @property
    def kept_nbytes(self) -> int:
        return self._lane.kept_nbytes

    @property
    def ring_nbytes(self) -> int:
        return self._lane.ring.buffer.nbytes

    # The owner's side of Backprop.

    def enter(self, unit: str, *, is_backward: bool) -> None:
        if not is_backward:
            if self._due:
                self._update(LOOSE)
            self._update(unit)

    def visit(self, unit: str, number: int) -> None:
        """Every micro-batch finds the same weights."""

    def add(self, unit: str, gradients: Gradients) -> None:
        own = {}
        for name, gradient in gradients.items():
            if name in self._loose:
                self._sum(name, gradient)
            elif self._micro_batches == 1:
                own[name] = gradient
            else:
                self._sum(name, gradient)
        if self._micro_batches == 1:
            self._finish(unit, own)

    def leave(self, unit: str, *, is_backward: bool) -> None:
        if not is_backward:
            return
        self._seen.add(unit)
        if self._micro_batches > 1:
            names = [n for n in self.cells.layouts[unit].places if n in self._sums]
            self._finish(unit, {n: self._sums.pop(n) for n in names})
        if self._max_norm is None and self.cells.layouts[unit].places:
            self._learn_order()
            self._update(unit)

    def _sum(self, name: str, gradient: torch.Tensor) -> None:
        """Adds to a parameter's gradient in float32."""
        if name in self._sums:
            self._sums[name] += gradient
        else:
            self._sums[name] = gradient.float().clone()

    def _finish(self, unit: str, gradients: Gradients) -> None:
        """Puts the gradient of a cell in place of its weights, rounded once."""
        for name in self.cells.layouts[unit].places:
            if name in gradients:
                self.cells.views[name].copy_(gradients[name])
            else:
                self.cells.views[name].zero_()
        for name, padded in self.cells.padded(unit):
            self._squares[name] = self._kernels.run("square_sum", padded)
        self._due.add(unit)

    def _check_uses(self) -> None:
        """Every unit has its gradient, and no parameter has one that went past its unit."""
        asleep = [u for u in self.backprop.order if u not in self._seen and self.cells.layouts[u].places]
        if asleep:
            raise ModelError(f"the loss does not depend on {', '.join(asleep[:4])}; that cannot be trained yet")
        for module, attribute, _ in self._bound:
            parameter = module._parameters[attribute]
            name = self._names[id(parameter)]
            if parameter is not None and parameter.grad is not None and name not in self._loose:
                raise ModelError(f"{name} is used outside its unit; such models cannot be trained yet")

    def _finish_loose(self) -> None:
        for module, attribute, _ in self._bound:  # uses outside every unit
            parameter = module._parameters[attribute]
            name = self._names[id(parameter)]
            if parameter is not None and parameter.grad is not None and name in self._loose:
                self._sum(name, parameter.grad)
                parameter.grad = None
        self._finish(LOOSE, {n: self._sums.pop(n) for n in list(self._sums)})
        if self._max_norm is None:
            self._update(LOOSE)

    # Updates.

    def _update(self, unit: str) -> None:
        """Applies the update of a cell, if one is due: gradient and state become weights and state."""
        if unit not in self._due:
            return
        for shard in self.cells.layouts[unit].shards:
            held = self._lane.take(shard.name)
            start = now()
            state = self._state_of(shard.name, held.view)
            self._rule.step(state, self.cells.shard(shard), self._numbers, decays=shard.decays)
            self.timeline.add("update", shard.name, start, now(), len(held.view))
            self._lane.give(held, self._generation)
        self._due.discard(unit)

    def _learn_order(self) -> None:
        """The order of the first pass is that of all updates; the lane starts with it."""
        units = self.backprop.order
        missing = [u.name for u in self._anatomy.units if u.name not in units and self.cells.layouts[u.name].places]
        if missing:
            raise ModelError(
                f"{', '.join(missing[:4])} did not run in the first step, so there is nothing to train there"
            )
        used = [u for u in units if self.cells.layouts[u].places]
        loose = [LOOSE] if self._loose else []
        order = [*loose, *used] if self._max_norm is not None else [*reversed(used), *loose]
        if not self._order:
            self._order = order
            self._lane.close()
            self._lane = self._make_lane(order)
            self._lane.start()
        elif order != self._order:
            raise ModelError(
                "the model's units ran in another order than in the first step; that cannot be trained yet"
            )

    def _make_lane(self, cells: Sequence[str]) -> ShardLane:
        names = [shard.name for cell in cells for shard in self.cells.layouts[cell].shards]
        return ShardLane(self.state, names, self._nbytes, min(self._slots, len(names)), self.timeline)

    def _state_of(self, name: str, view: memoryview) -> torch.Tensor:
        """A shard's state without what fills its last page."""
        return as_tensor(view)[: self._rule.state_nbytes(self._shards[name].shape)]

    def _cell(self, name: str) -> torch.Tensor:
        shard: Shard = self._shards[name]
        return self.cells.shard(shard)

    def _bind(self) -> None:
        """Makes the cells' views the model's parameters."""
        self._names: dict[int, str] = {}
        for name in self._anatomy.owners:
            if name in self._frozen:
                self._bind_one(name, nn.Parameter(self._frozen[name], requires_grad=False))
                continue
            # .data: autograd counts changes of a tensor and all its views, and cells are views of one area.
            self._bind_one(name, nn.Parameter(self.cells.views[name].data, requires_grad=True))

    def _bind_one(self, name: str, parameter: nn.Parameter) -> None:
        self._names[id(parameter)] = name
        for owner in self._anatomy.owners[name]:
            self._bound.append((owner.module, owner.attribute, owner.module._parameters[owner.attribute]))
            owner.module._parameters[owner.attribute] = parameter
