"""Runs a model's units under autograd, a unit at a time, and tells the owner of their weights when each is used.

The forward of a unit keeps its inputs and nothing else; its backward runs it again, with a graph, and takes the
gradients of its inputs and of its parameters from that. (Units that may, and the last one, keep their graph instead.)
What it keeps may wait elsewhere in between (`unit_inputs.py`).
So autograd walks from unit to unit in reverse, and entering one is the rendezvous with its weights, as in inference.

Random numbers, as dropout draws them, depend on the step, the micro-batch and the unit alone: running a unit again
draws the same ones, in whatever order micro-batches pass.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from offload.errors import ModelError
from offload.runtime.losses import use_pieces
from offload.runtime.turns import Turns, run
from offload.runtime.unit_calls import Call, Part, sow
from offload.runtime.unit_inputs import UnitInputs

Gradients = Mapping[str, torch.Tensor]
Loss = Callable[[], torch.Tensor]


class Owner(Protocol):
    """Who has the weights."""

    def enter(self, unit: str, *, is_backward: bool) -> None:
        """The first micro-batch is about to enter: the unit's parameters must hold their weights."""

    def visit(self, unit: str, number: int) -> None:
        """A micro-batch is about to run forward."""

    def add(self, unit: str, gradients: Gradients) -> None:
        """The gradients of one micro-batch; the parameters still hold the weights."""

    def leave(self, unit: str, *, is_backward: bool) -> None:
        """The last micro-batch has left."""


class Backprop:
    """Puts itself between a model and its units until it is closed.

    Args:
        root: the model; those of its parameters that require gradients are trained.
        units: (name, module) in any order; they must not contain each other.
        owner: is told of every visit.
        seed: of random numbers.
        device: where it computes.

    Attributes:
        parts: the units, by name.
        inputs: what units were given, and where it waits for their backward.
        order: units in the order in which the last pass entered them.
        measures: whether parts note what their runs take.
    """

    def __init__(
        self,
        root: nn.Module,
        units: Sequence[tuple[str, nn.Module]],
        owner: Owner,
        seed: int = 0,
        device: torch.device | None = None,
    ) -> None:
        self._owner, self._seed, self._device = owner, seed, device or torch.device("cpu")
        self.inputs = UnitInputs()
        names = {id(p): n for n, p in root.named_parameters()}
        self.parts: dict[str, Part] = {}
        self._own_forward: dict[str, Any] = {}
        for name, module in units:
            own = {names[id(p)]: p for p in module.parameters() if p.requires_grad}
            self.parts[name] = Part(name, module, own, module.forward, len(self.parts))
            self._own_forward[name] = module.__dict__.get("forward")
            module.forward = self._wrapped(self.parts[name])  # type: ignore[method-assign]
        self._own_loss_back = use_pieces(root)
        self._local = threading.local()  # of a micro-batch: number, now (unit and direction), inside, seen
        self._turns = Turns(1)
        self._step = 0
        self._learns = False
        self._is_running = False
        self.order: list[str] = []
        self.measures = False

    def run(self, losses: Sequence[Loss], scales: Sequence[float] | None, step: int) -> list[float]:
        """Runs every micro-batch forward and, with `scales`, backward.

        Args:
            losses: each runs the model on one micro-batch.
            scales: what each loss is multiplied by; None: forward only.
            step: which step this is, for random numbers.

        Returns:
            The losses, not multiplied.
        """
        self._turns, self._step = Turns(len(losses)), step
        self._learns, self.order = scales is not None, []
        self.inputs.begin()
        found = [0.0] * len(losses)

        def body(number: int) -> None:
            self._local.number, self._local.inside, self._local.seen, self._local.now = number, None, set(), None
            sow(self._random(number, len(self.parts)), self._device)
            with torch.set_grad_enabled(self._learns):
                loss = losses[number]()
            if scales is not None:
                # In this thread also where autograd has one for a device: micro-batches take turns in it.
                with torch.autograd.set_multithreading_enabled(False):
                    loss.backward(torch.tensor(scales[number], dtype=loss.dtype, device=loss.device))
            found[number] = float(loss.detach())  # waits for a device that computes on its own, so at the end
            self._leave()

        state = torch.get_rng_state()
        self._is_running = True
        try:
            run([body] * len(losses), self._turns)
        finally:
            self._is_running = False
            torch.set_rng_state(state)
            self.inputs.clear()
        return found

    def close(self) -> None:
        """Gives the units their own forward back, the model its loss, and the stash its memory and disk."""
        self.inputs.close()
        self._own_loss_back()
        for name, part in self.parts.items():
            part.module.__dict__.pop("forward", None)
            if self._own_forward[name] is not None:
                part.module.forward = self._own_forward[name]  # type: ignore[method-assign]

    # Visits.

    def _enter(self, part: Part, *, is_backward: bool) -> None:
        """Waits for this micro-batch's turn in a unit. The last unit of a forward pass is the first of the backward
        pass, and one turn is both: nothing is kept between them but for one micro-batch."""
        number, before = self._local.number, self._local.now
        is_same = is_backward and before == (part.name, False)
        if before is not None and not is_same:
            self._leave()
            self._turns.next(number)
        if self._turns.is_first() and not is_same:
            self._owner.enter(part.name, is_backward=is_backward)
            if not is_backward:
                self.order.append(part.name)
        self._local.now = (part.name, is_backward)
        if not is_backward:
            self._owner.visit(part.name, number)

    def _leave(self) -> None:
        """A micro-batch is about to end its turn."""
        if self._local.now is not None and self._turns.is_last():
            unit, is_backward = self._local.now
            self._owner.leave(unit, is_backward=is_backward)

    def _wrapped(self, part: Part) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not self._is_running:
                return part.forward(*args, **kwargs)
            if self._local.inside is not None:
                raise ModelError(f"{part.name} runs inside {self._local.inside}; such models cannot be trained yet")
            if part.name in self._local.seen:
                raise ModelError(f"{part.name} runs more than once a pass; such models cannot be trained yet")
            self._local.seen.add(part.name)
            leaves, spec = tree_flatten((args, kwargs))
            where = [k for k, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
            tensors = [leaves[k] for k in where]
            for k in where:
                leaves[k] = None
            call = Call(part, leaves, where, spec, self._random(self._local.number, part.index), self._device)
            anchor = torch.zeros((), requires_grad=True)  # without one, autograd would not come back to the first unit
            out = _Unit.apply(self, call, anchor, *tensors)
            assert call.out_spec is not None
            results = iter(out)
            leaves = [next(results) if isinstance(leaf, torch.Tensor) else leaf for leaf in call.out_leaves]
            call.out_leaves = []
            return tree_unflatten(leaves, call.out_spec)

        return forward

    def _random(self, number: int, unit: int) -> int:
        """A seed for the random numbers of one unit's run."""
        mixed = self._seed
        for part in (self._step, number, unit):
            mixed = (mixed * 6364136223846793005 + part * 2 + 1442695040888963407) % (1 << 62)
        return mixed

    def forward(self, call: Call, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """A unit's forward, for _Unit."""
        part = call.part
        self._enter(part, is_backward=False)
        is_last = part.index == len(self.parts) - 1  # its backward follows at once
        call.away = self.inputs.put_away(
            part,
            tensors,
            len(self.order),
            self._local.number,
            may_go=self._learns and not part.keeps and not is_last,
            measures=self.measures,
        )
        self._local.inside = part.name
        try:
            if part.keeps and self._learns:
                call.graph = call.with_graph(tensors, [t.requires_grad for t in tensors], measures=self.measures)
                return [t.detach() for t in call.graph[1]]
            with torch.no_grad():
                return [t.detach() for t in call.run(tensors)]
        finally:
            self._local.inside = None

    def backward(
        self, call: Call, saved: Sequence[torch.Tensor], needs: Sequence[bool], grads: Sequence[torch.Tensor | None]
    ) -> list[torch.Tensor | None]:
        """A unit's backward, for _Unit: gives its parameters' gradients to the owner, returns those of its inputs."""
        part = call.part
        self._enter(part, is_backward=True)
        tensors = self.inputs.bring_back(call.away, saved)
        self._local.inside = part.name
        try:
            of_inputs, of_parameters = call.gradients(tensors, needs, grads, measures=self.measures)
        finally:
            self._local.inside = None
        self._owner.add(part.name, of_parameters)
        return of_inputs


class _Unit(torch.autograd.Function):
    """One run of a unit as one node of autograd's graph."""

    @staticmethod
    def forward(ctx: Any, backprop: Backprop, call: Call, anchor: torch.Tensor, *tensors: torch.Tensor) -> Any:
        ctx.backprop, ctx.call = backprop, call
        ctx.gives_up_outputs = type(call.part.module) is nn.Linear  # whose backward does not read them; see losses.py
        ctx.set_materialize_grads(False)
        outputs = backprop.forward(call, tensors)
        ctx.save_for_backward(*[t for k, t in enumerate(tensors) if k not in call.away])
        ctx.mark_non_differentiable(*[t for t in outputs if not t.is_floating_point()])
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        needs = ctx.needs_input_grad[3:]
        found = ctx.backprop.backward(ctx.call, ctx.saved_tensors, needs, grads)
        return (None, None, None, *found)
