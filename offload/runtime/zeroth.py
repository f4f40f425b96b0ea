"""Zeroth-order training (MeZO, Malladi et al., 2023): two forward passes along a random direction, and no gradient.

Both passes visit a unit in one turn, as micro-batches of two signs do: from where its weights are, they are moved to
one side and to the other. Updates wait until the unit's next visit (ZO2, 2025), so that weights travel once a step.
Directions follow from seed, step and parameter; so the weights of any step are those of the checkpoint and a log of one
number a step.

    base (checkpoint, or written back) -> slot | the log's updates since then | + eps, - eps | both signs run |

Weights that stay in memory are updated in place. Those that stream are as their base is on disk: what the log has since
then is applied whenever they load, in order, rounded to their dtype after each step as if they had been in memory all
the time. Now and then a pass writes them back as they are (`writeback`), to a new file that the next commit may name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from offload.errors import ModelError
from offload.io.engine import Engine
from offload.kernels.chosen import Kernels
from offload.kernels.reference.directions import Along, Sides
from offload.planner.placement import Placement
from offload.runtime.backprop import Backprop, Gradients, Loss
from offload.runtime.bases import Bases
from offload.runtime.buffers import move_buffers
from offload.runtime.discovery import Anatomy
from offload.runtime.sides import TwoSides
from offload.runtime.streams import Streams, Whereabouts
from offload.runtime.timeline import Timeline, now
from offload.runtime.training import Pass
from offload.runtime.writeback import WriteBack
from offload.tiers.device import Device
from offload.tiers.devices import CpuDevice
from offload.tiers.layout import Source
from offload.tiers.logfile import LogFile

TOGETHER = 8  # micro-batches of an evaluation that share a pass over weights
REPLAYED = 64  # updates that a resumed run applies at most to weights that stay; with more, a commit writes them


class Zeroth:
    """Runs steps; the same to a Trainer as runtime.training.Training.

    Args:
        root: the model; its parameters are replaced while this lives.
        anatomy: its units, from `dissect(root, shares=False)`.
        sources: its weights, as the checkpoint or a base has them.
        placement: which of them stay in memory.
        engine: moves bytes; its owner closes it.
        kernels: what computes.
        state: the log and the bases.
        eps: how far weights are moved to each side.
        seed: of directions.
        limits: parameter -> the magnitude above which its weights do not move; those that are not named all move.
        write_every: steps after which what streams is written back; None: as it pays.
        disk_limit: bytes that weights may take in the log's folder; None: what is free.
        device: where the model computes; None: on the CPU, which moves weights in any case. Closed with this.

    Attributes:
        fallbacks: what did not go the fast way, a sentence each.
    """

    ring_nbytes = 0

    def __init__(
        self,
        root: nn.Module,
        anatomy: Anatomy,
        sources: Mapping[str, Source],
        placement: Placement,
        engine: Engine,
        kernels: Kernels,
        state: LogFile,
        *,
        eps: float,
        seed: int,
        limits: Mapping[str, float] | None = None,
        write_every: int | None = None,
        disk_limit: int | None = None,
        device: Device | None = None,
    ) -> None:
        self.root, self.state, self._kernels = root, state, kernels
        self._eps, self._sources = eps, sources
        self.timeline, self.device = Timeline(), device or CpuDevice()
        where = self.device.torch_device
        self._along = {n: Along(seed, n, (limits or {}).get(n, float("inf"))) for n in sources}
        self._used = uses(anatomy)
        outside = set(sources) - {n for used in self._used.values() for n in used}
        if outside:
            raise ModelError(f"{sorted(outside)[0]} is used outside every unit; such models cannot be trained yet")
        self._step = 0  # the step whose direction is used; 0: weights stay as they are
        self._half = 0
        self._apply_s = 0.0
        self._entered = 0.0
        with ExitStack() as undone:  # closed again if nobody will own it
            self._sides = TwoSides(self._used, sources, self.device)
            undone.callback(self._sides.close)
            self.fallbacks = [self._sides.fallback] if self._sides.fallback is not None else []
            self.streams = Streams(anatomy, sources, placement, engine, kernels, self._present, computes_on=where)
            undone.callback(self.streams.close)
            self._put_back = move_buffers(root, where)
            undone.callback(self._put_back)
            self._bases = Bases(sources, state, self.streams, engine, kernels, disk_limit, self.fallbacks)
            self._has = self._bases.steps()  # updates that a parameter has where it is
            self._travelling = [n for u in self.streams.travelling for n in self.streams.bundle(u)]
            self._staying = [n for n in sources if n not in set(self._travelling)]
            self._order = [u.name for u in anatomy.units]
            self._rhythm = WriteBack(sum(sources[n].nbytes for n in self._travelling), write_every)
            self.streams.fill()
            self.streams.start(self.timeline)
            self.flush()
            self.backprop = Backprop(root, [(u.name, u.module) for u in anatomy.units], self, seed, where)
            undone.pop_all()

    # What a trainer calls.

    def run(self, losses: Sequence[Loss], scales: Sequence[float], numbers: Callable[[float], Any], step: int) -> Pass:
        """Two forward passes of all micro-batches; see Training.run. `grad_norm` is the projected gradient's size."""
        self.root.eval()  # both passes must see the same model
        self._half, self._step = len(losses), step
        found = self._pass([*losses, *losses], step)
        plus, minus = found[: self._half], found[self._half :]
        projected = sum((p - m) * s for p, m, s in zip(plus, minus, scales, strict=True)) / (2 * self._eps)
        if projected - projected != 0:
            raise ModelError(f"the loss of step {step} is not finite: {found}")
        self.state.log.append(-numbers(1.0).learning_rate * projected)
        return Pass([(p + m) / 2 for p, m in zip(plus, minus, strict=True)], abs(projected), 1.0)

    def evaluate(self, losses: Sequence[Loss], step: int) -> list[float]:
        """Losses of micro-batches with the present weights."""
        self._step, found = 0, list[float]()
        for first in range(0, len(losses), TOGETHER):
            found += self._pass(losses[first : first + TOGETHER], step)
        return found

    def flush(self) -> None:
        """Applies every update that is due to weights that stay in memory."""
        for name in self._staying:
            self._apply(name, self.streams.store.kept(name))

    @property
    def weights(self) -> Mapping[str, torch.Tensor]:
        """The present weights by name; those that stream are read when they are asked for."""
        self.flush()
        return _Present(self, list(self._sources))

    def whereabouts(self) -> Whereabouts:
        """Where the weights are."""
        return replace(self.streams.whereabouts(self._order), beside_nbytes=self._sides.nbytes)

    def commit(self, extra: Mapping[str, Any]) -> None:
        """Makes the present step the one that a later run finds."""
        self._bases.sync()
        if self._bases.lacking(self._staying) > REPLAYED and self._bases.has_room(self.streams.store.arena.used_nbytes):
            self.flush()
            self._bases.write_staying(self._staying)
        self._bases.commit(extra)

    def close(self) -> None:
        """Gives the model its own forwards back and the memory to the system."""
        self.backprop.close()
        self.streams.close()
        self._sides.close()
        self._put_back()
        self.device.close()
        self._bases.close()

    # Passes.

    def _pass(self, losses: Sequence[Loss], step: int) -> list[float]:
        updates = len(self.state.log) - min((self._has[n] for n in self._travelling), default=0)
        is_writing = bool(self._step) and self._rhythm.is_due(updates)
        is_writing = is_writing and self._bases.has_room(sum(self._bases.image_sizes().values()))
        if is_writing:
            self._bases.begin()
        self.streams.follow(self._order)
        self._apply_s = 0.0
        found = self.backprop.run(losses, None, step)
        self._order = list(self.backprop.order)
        self._rhythm.add_pass(self._apply_s * updates / (updates + 1))
        if is_writing:
            base, write_s = self._bases.end()
            self._has |= dict.fromkeys(base.places, base.step)
            self._rhythm.add_writes(write_s)
        return found

    # The owner's side of Backprop.

    def enter(self, unit: str, *, is_backward: bool) -> None:
        in_slot = self.streams.enter(unit)
        plus, minus = self._sides.of(unit)
        start = now()
        for name in self._used[unit]:
            weights = in_slot.get(name)
            stays = weights is None
            if weights is None:
                weights = self.streams.store.kept(name)
            due = self._due(name)
            is_kept = stays or not self._step or self._bases.images is not None
            sides = Sides(self._step, self._eps, plus[name], minus[name]) if self._step else None
            if due or sides is not None:
                kept = weights if due and is_kept else None
                self._kernels.run("move_along", weights, self._along[name], due, kept, sides)
            if sides is None and self._sides.are_sent:
                plus[name].copy_(weights)
            if stays:
                self._has[name] = len(self.state.log)
        end = self._entered = now()
        self.timeline.add("move", unit, start, end, 0)
        if self._sides.are_sent:
            sent = self._sides.send(unit, both=bool(self._step))
            self._entered = now()
            self.timeline.add("upload", unit, end, self._entered, sent)
        if in_slot:
            self._apply_s += end - start
            if self._bases.images is not None:
                store = self.streams.store
                image = self.streams.slot[: store.image_nbytes(unit)]
                self._bases.images.write(unit, image, store.places(unit))

    def visit(self, unit: str, number: int) -> None:
        """Before each micro-batch: to the one side for the first half of them, to the other for the second."""
        if self._step and number in (0, self._half):
            self.streams.bind(self._sides.used(unit)[0 if number == 0 else 1])
        elif self._sides.are_sent and number == 0:
            self.streams.bind(self._sides.used(unit)[0])

    def add(self, unit: str, gradients: Gradients) -> None:
        raise AssertionError("there is no backward pass")

    def leave(self, unit: str, *, is_backward: bool) -> None:
        self.timeline.add("compute", unit, self._entered, now())
        if self._bases.images is not None and self.streams.travels(unit):
            start = now()
            self._bases.images.wait(unit)
            self.timeline.stall("compute:write", unit, start, now())
        store = self.streams.store
        self.streams.bind({n: t for n in self._used[unit] if (t := store.resident(n)) is not None})
        self.streams.leave(unit)

    # Updates.

    def _due(self, name: str) -> list[tuple[int, float]]:
        """What a parameter still lacks: steps and distances."""
        has, log = self._has[name], self.state.log
        return [(step, log[step - 1]) for step in range(has + 1, len(log) + 1)]

    def _apply(self, name: str, weights: torch.Tensor) -> None:
        due = self._due(name)
        if due:
            self._kernels.run("move_along", weights, self._along[name], due, weights)
            self._has[name] = len(self.state.log)

    def _present(self, name: str, weights: torch.Tensor) -> torch.Tensor:
        """A parameter that streams, as read by somebody who wants it as it is now."""
        due = self._due(name)
        if due:
            self._kernels.run("move_along", weights, self._along[name], due, weights)
        return weights


class _Present(Mapping[str, torch.Tensor]):
    """Present weights; of those that stream only the last one is held."""

    def __init__(self, training: Zeroth, names: Sequence[str]) -> None:
        self._streams, self._names = training.streams, dict.fromkeys(names)
        self._last: tuple[str, torch.Tensor | None] = "", None

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        kept = self._streams.store.resident(name)
        if kept is not None:
            return kept
        if self._last[0] != name or self._last[1] is None:
            self._last = "", None
            self._last = name, self._streams.value(name)
        assert self._last[1] is not None
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def uses(anatomy: Anatomy) -> dict[str, list[str]]:
    """Unit -> the parameters below it, those that it shares with others too."""
    inside = {u.name: {id(module) for module in u.module.modules()} for u in anatomy.units}
    return {
        unit: [n for n, owners in anatomy.owners.items() if any(id(o.module) in modules for o in owners)]
        for unit, modules in inside.items()
    }
