"""Zeroth-order training (MeZO, Malladi et al., 2023): two forward passes along a random direction, and no gradient.

Both passes visit a unit in one turn, as micro-batches of two signs do: its weights are moved to one side, then to the
other, then back. The update along the same direction waits until the unit's next visit (ZO2, 2025), so that weights are
touched once a step. Directions follow from seed, step and parameter; so the weights of any step are those of the
checkpoint and a log of two numbers a step, and the log is all that a commit writes.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from offload.errors import ModelError
from offload.runtime.backprop import Backprop, Gradients, Loss
from offload.runtime.discovery import Anatomy
from offload.runtime.timeline import Timeline
from offload.runtime.training import Pass
from offload.tiers.cells import Cells
from offload.tiers.logfile import LogFile


def direction(seed: int, step: int, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The random direction of a step, for one parameter: standard normal, float32."""
    mixed = (seed * 1_000_003 + step) * 1_000_003 + zlib.crc32(name.encode())
    return torch.randn(shape, generator=torch.Generator().manual_seed(mixed % (1 << 62)))


def moved(weights: torch.Tensor, along: torch.Tensor, by: float) -> torch.Tensor:
    """`weights` moved, rounded once to their dtype."""
    return torch.add(weights.float(), along, alpha=by).to(weights.dtype)


class Zeroth:
    """Runs steps; the same to a Trainer as runtime.training.Training.

    Args:
        root: the model; its parameters are replaced while this lives.
        anatomy: its units, from `dissect(root, shares=False)`.
        cells: its weights, as the checkpoint has them.
        state: the log.
        eps: how far weights are moved to each side.
        seed: of directions.
    """

    ring_nbytes = 0

    def __init__(
        self, root: nn.Module, anatomy: Anatomy, cells: Cells, state: LogFile, *, eps: float, seed: int
    ) -> None:
        self.root, self.cells, self.state = root, cells, state
        self._eps, self._seed = eps, seed
        self.timeline = Timeline()
        self._bound: list[tuple[nn.Module, str, nn.Parameter | None]] = []
        for name, owners in anatomy.owners.items():
            parameter = nn.Parameter(cells.views[name].data, requires_grad=False)
            for owner in owners:
                self._bound.append((owner.module, owner.attribute, owner.module._parameters[owner.attribute]))
                owner.module._parameters[owner.attribute] = parameter
        names = {id(p): n for n, p in root.named_parameters()}
        self._used = {u.name: [names[id(p)] for p in u.module.parameters()] for u in anatomy.units}
        outside = set(cells.views) - {n for used in self._used.values() for n in used}
        if outside:
            raise ModelError(f"{sorted(outside)[0]} is used outside every unit; such models cannot be trained yet")
        self._loose = set(anatomy.loose)
        self.backprop = Backprop(root, [(u.name, u.module) for u in anatomy.units], self, seed)
        self._step = 0  # the step whose direction is used; 0: weights stay as they are
        self._due: dict[str, tuple[int, float]] = {}  # parameter -> step and distance of an update that is due
        self._base: dict[str, torch.Tensor] = {}
        self._along: dict[str, torch.Tensor] = {}
        self._half = 0
        for step, by in enumerate(state.log, 1):  # a run that goes on
            self._due = dict.fromkeys(cells.views, (step, by))
            self.flush()

    def run(self, losses: Sequence[Loss], scales: Sequence[float], numbers: Callable[[float], Any], step: int) -> Pass:
        """Two forward passes of all micro-batches; see Training.run. `grad_norm` is the projected gradient's size."""
        self.root.eval()  # both passes must see the same model
        self._half, self._step = len(losses), step
        self._apply(self._loose)
        found = self.backprop.run([*losses, *losses], None, step)
        self._step = 0
        plus, minus = found[: self._half], found[self._half :]
        projected = sum((p - m) * s for p, m, s in zip(plus, minus, scales, strict=True)) / (2 * self._eps)
        if projected - projected != 0:
            raise ModelError(f"the loss of step {step} is not finite: {found}")
        by = -numbers(1.0).learning_rate * projected
        self.state.log.append(by)
        self._due = dict.fromkeys(self.cells.views, (step, by))
        return Pass([(p + m) / 2 for p, m in zip(plus, minus, strict=True)], abs(projected), 1.0)

    def evaluate(self, losses: Sequence[Loss], step: int) -> list[float]:
        """Losses of micro-batches with the present weights, one after the other."""
        self.flush()
        return [self.backprop.run([loss], None, step)[0] for loss in losses]

    def flush(self) -> None:
        """Applies every update that is due."""
        self._apply(list(self._due))

    def commit(self, extra: Mapping[str, Any]) -> None:
        """Makes the present step the one that a later run finds."""
        self.state.commit(extra)

    def close(self) -> None:
        """Gives the model its parameters back."""
        self.backprop.close()
        for module, attribute, parameter in self._bound:
            module._parameters[attribute] = parameter
        self._bound.clear()

    # The owner's side of Backprop.

    def enter(self, unit: str, *, is_backward: bool) -> None:
        self._apply(self._used[unit])
        if self._step:
            for name in self._used[unit]:
                view = self.cells.views[name]
                self._base[name] = view.clone()
                self._along[name] = direction(self._seed, self._step, name, tuple(view.shape))

    def visit(self, unit: str, number: int) -> None:
        """Before each micro-batch: to the one side for the first half of them, to the other for the second."""
        if self._step and number in (0, self._half):
            by = self._eps if number == 0 else -self._eps
            for name in self._used[unit]:
                self.cells.views[name].copy_(moved(self._base[name], self._along[name], by))

    def add(self, unit: str, gradients: Gradients) -> None:
        raise AssertionError("there is no backward pass")

    def leave(self, unit: str, *, is_backward: bool) -> None:
        for name, base in self._base.items():
            self.cells.views[name].copy_(base)
        self._base.clear()
        self._along.clear()

    def _apply(self, names: Sequence[str] | set[str]) -> None:
        for name in [n for n in names if n in self._due]:
            step, by = self._due.pop(name)
            view = self.cells.views[name]
            view.copy_(moved(view, direction(self._seed, step, name, tuple(view.shape)), by))
